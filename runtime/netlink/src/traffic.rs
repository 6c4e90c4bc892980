//! Traffic control: everything that comes in at one interface goes out at another.
//!
//! Three parts: a `clsact` queueing discipline gives the interface a place for filters, a `matchall`
//! filter there takes every packet, and its action `mirred` passes the packet on.

use std::io;

use rustix::io::Errno;

use crate::connection::{Connection, NLM_F_CREATE, NLM_F_EXCL};
use crate::message::{Message, Request, u32_at};

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_MATCHALL_ACT: u16 = 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: u32 = 1;
const TC_ACT_STOLEN: u32 = 4;

/// `TC_H_CLSACT`, as a parent and as a handle.
const CLSACT_PARENT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// Where the filters for what comes in are, and for what goes out.
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;

/// Names our filter among others: late, so that what others filter is filtered.
const PREFERENCE: u32 = 0x4855;
/// `ETH_P_ALL`
const EVERY_PROTOCOL: u16 = 3;
/// The first action of a filter.
const FIRST_ACTION: u16 = 1;

/// `struct tcmsg`.
const STRUCTURE_BYTES: usize = 20;

fn structure(link: u32, handle: u32, parent: u32, info: u32) -> [u8; STRUCTURE_BYTES] {
    let mut bytes = [0; STRUCTURE_BYTES];
    bytes[4..8].copy_from_slice(&link.to_ne_bytes());
    bytes[8..12].copy_from_slice(&handle.to_ne_bytes());
    bytes[12..16].copy_from_slice(&parent.to_ne_bytes());
    bytes[16..20].copy_from_slice(&info.to_ne_bytes());
    bytes
}

/// Preference and protocol, as the kernel wants them in one number.
fn filter_info() -> u32 {
    (PREFERENCE << 16) | u32::from(EVERY_PROTOCOL.to_be())
}

impl Connection {
    /// Passes everything that comes in at the link `from` on to leave at the link `to`. A redirection
    /// that an earlier call has left there is replaced.
    ///
    /// # Errors
    /// The kernel's.
    pub fn redirect(&mut self, from: u32, to: u32) -> io::Result<()> {
        let exclusive = NLM_F_CREATE | NLM_F_EXCL;
        let added = self.call(RTM_NEWQDISC, exclusive, &|kind, flags| {
            let structure = structure(from, CLSACT_HANDLE, CLSACT_PARENT, 0);
            Request::new(kind, flags, &structure).text(TCA_KIND, "clsact")
        });
        match added {
            Err(error) if is(&error, Errno::EXIST) => {
                self.remove_filter(from)?;
            }
            added => added?,
        }
        self.call(RTM_NEWTFILTER, exclusive, &|kind, flags| {
            let structure = structure(from, 0, INGRESS, filter_info());
            Request::new(kind, flags, &structure)
                .text(TCA_KIND, "matchall")
                .nest(TCA_OPTIONS, |options| {
                    options.nest(TCA_MATCHALL_ACT, |actions| {
                        actions.nest(FIRST_ACTION, |action| add_mirred(action, to))
                    })
                })
        })
    }

    /// Ends the redirection of a link. Filters of others stay. Nothing there is no error.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_redirect(&mut self, from: u32) -> io::Result<()> {
        if !self.remove_filter(from)? || self.has_filters(from)? {
            return Ok(());
        }
        let removed = self.call(RTM_DELQDISC, 0, &|kind, flags| {
            let structure = structure(from, CLSACT_HANDLE, CLSACT_PARENT, 0);
            Request::new(kind, flags, &structure).text(TCA_KIND, "clsact")
        });
        none_is_fine(removed).map(drop)
    }

    /// Whether there was one.
    fn remove_filter(&mut self, from: u32) -> io::Result<bool> {
        let removed = self.call(RTM_DELTFILTER, 0, &|kind, flags| {
            let structure = structure(from, 0, INGRESS, filter_info());
            Request::new(kind, flags, &structure).text(TCA_KIND, "matchall")
        });
        none_is_fine(removed)
    }

    fn has_filters(&mut self, link: u32) -> io::Result<bool> {
        for parent in [INGRESS, EGRESS] {
            let request =
                |flags| Request::new(RTM_GETTFILTER, flags, &structure(link, 0, parent, 0));
            let is_filter = |message: Message<'_>| {
                (message.kind == RTM_NEWTFILTER && u32_at(message.payload, 4)? == link)
                    .then_some(())
            };
            if !self.dump(request, is_filter)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// `struct tc_mirred`: index, capab, action, refcnt, bindcnt, eaction, ifindex.
fn add_mirred(action: Request, to: u32) -> Request {
    let parameters = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to];
    let parameters: Vec<u8> = parameters.into_iter().flat_map(u32::to_ne_bytes).collect();
    action
        .text(TCA_ACT_KIND, "mirred")
        .nest(TCA_ACT_OPTIONS, |options| {
            options.attribute(TCA_MIRRED_PARMS, &parameters)
        })
}

/// Whether there was something to remove. A link without the discipline answers `EINVAL`.
fn none_is_fine(removed: io::Result<()>) -> io::Result<bool> {
    match removed {
        Ok(()) => Ok(true),
        Err(error)
            if [Errno::NOENT, Errno::INVAL, Errno::NODEV]
                .iter()
                .any(|errno| is(&error, *errno)) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}
