//! The C library's allocator, tuned to the filters.
//!
//! By default glibc makes an arena for each thread: memory and system calls for threads that hardly
//! allocate, and it reads files of `/proc` and `/sys` to decide on their number and size, which would
//! end a confined process. One arena for all does neither. This is one of the modules that allow
//! unsafe code.

/// Makes all threads share one arena. Called before there is a second thread.
pub(crate) fn use_one_arena() {
    // SAFETY: changes a number in the allocator's settings; no other thread allocates meanwhile.
    let is_taken = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    debug_assert_eq!(is_taken, 1, "glibc knows the parameter");
}
