//! The checks, by subject.

mod acl;
mod attributes;
mod data;
mod directories;
mod identity;
pub(crate) mod locks;
mod names;
mod rename;
mod space;
mod special;
mod xattr;

use crate::harness::Check;

/// All of them.
pub(crate) const ALL: &[&[Check]] = &[
    names::CHECKS,
    rename::CHECKS,
    attributes::CHECKS,
    identity::CHECKS,
    data::CHECKS,
    space::CHECKS,
    directories::CHECKS,
    xattr::CHECKS,
    acl::CHECKS,
    locks::CHECKS,
    special::CHECKS,
];

/// A list of checks from functions, each named by its function.
macro_rules! checks {
    ($($name:ident),* $(,)?) => {
        pub(crate) const CHECKS: &[crate::harness::Check] = &[
            $(crate::harness::Check { name: stringify!($name), run: $name },)*
        ];
    };
}
use checks;
