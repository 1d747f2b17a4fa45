//! The only unsafe code: system calls whose safety the compiler can't see.
//!
//! Each function is a thin, safe face for one call. What they build on: the monitor has one thread.
#![allow(unsafe_code)]

use std::{
    io::{self, IoSlice},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
};

use std::sync::atomic::AtomicI32;

use nix::{
    errno::Errno,
    libc,
    sys::{
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
        socket::{ControlMessage, MsgFlags, sendmsg},
    },
    unistd::{ForkResult, Pid},
};
use tokio::io::unix::AsyncFd;

/// Most descriptors that travel with one message.
pub const MAX_DESCRIPTORS: usize = 3;

/// Forks, and runs `child` in the child, which never returns from it; gives the child's pid to the parent.
///
/// `child` may allocate and take locks only because no other thread exists that could hold one.
///
/// # Errors
///
/// As fork(2).
///
/// # Panics
///
/// If the process has more than one thread: a child could then wait for ever for a lock that nobody frees.
pub fn fork(child: impl FnOnce() -> i32) -> nix::Result<Pid> {
    assert!(is_single_threaded(), "fork with more than one thread");
    // SAFETY: the process has one thread (just checked), so the child may run any code, not only what is
    // async-signal-safe.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            // A panic must not unwind into the parent's code, which the child has a copy of.
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(PANICKED);
            exit_now(status)
        }
    }
}

/// Exit status of a child that panicked: EX_SOFTWARE of sysexits.h.
const PANICKED: i32 = 70;

/// Ends the process without running exit handlers, which belong to the process it was forked from.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit(2) has no preconditions.
    unsafe { libc::_exit(status) }
}

fn is_single_threaded() -> bool {
    libc_knows_no_other_thread() || no_other_thread_is_listed()
}

#[cfg(target_env = "gnu")]
fn libc_knows_no_other_thread() -> bool {
    unsafe extern "C" {
        /// <sys/single_threaded.h>: not zero as long as the C library knows of one thread only.
        static __libc_single_threaded: libc::c_char;
    }
    // SAFETY: the C library defines it, as a char; it changes only when this thread creates another.
    unsafe { (&raw const __libc_single_threaded).read_volatile() != 0 }
}

#[cfg(not(target_env = "gnu"))]
fn libc_knows_no_other_thread() -> bool {
    false
}

fn no_other_thread_is_listed() -> bool {
    // A directory per thread, beside `.` and `..`: counting its links is cheaper than reading it, as it is for each
    // filter. An unreadable /proc says nothing, and then the structure of the program must do.
    std::fs::metadata("/proc/self/task").map_or(true, |tasks| tasks.nlink() <= 3)
}

/// How a child ended: any signal, those included for which nix has no name (a filter may die of SIGRTMIN).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildEnd {
    /// With this status.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
}

impl std::fmt::Display for ChildEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exit status {status}"),
            Self::Signaled(number) => match Signal::try_from(*number) {
                Ok(signal) => write!(f, "killed by {signal}"),
                Err(_) => write!(f, "killed by signal {number}"),
            },
        }
    }
}

/// A child that has ended, if there is one. It stays a zombie, and its pid taken, until it is [reaped](reap).
///
/// # Errors
///
/// As waitid(2), but having no children is no error.
pub fn next_ended_child() -> nix::Result<Option<(Pid, ChildEnd)>> {
    // SAFETY: all zeros is a value of this plain structure.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: the kernel writes one siginfo_t where there is room for one.
    let result = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, flags) };
    match Errno::result(result) {
        Err(Errno::ECHILD) => return Ok(None),
        other => other?,
    };
    // SAFETY: waitid(2) sets these fields, or leaves the zeros that mean that no child has ended.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    let end = match info.si_code {
        libc::CLD_EXITED => ChildEnd::Exited(status),
        _ => ChildEnd::Signaled(status),
    };
    Ok((pid != 0).then_some((Pid::from_raw(pid), end)))
}

/// Reaps a child that has ended.
pub fn reap(pid: Pid) {
    // What it returns is known, and a signal without a name would be an error.
    let _ = nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WNOHANG));
}

/// Marks every descriptor from `first` on as close-on-exec, those too that were inherited from whoever started us.
///
/// # Errors
///
/// As close_range(2).
pub fn close_on_exec_from(first: u32) -> nix::Result<()> {
    // SAFETY: the call takes numbers only; it changes flags of descriptors and closes none.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    Errno::result(result).map(drop)
}

/// Closes every descriptor from 3 on that is not in the list: in a forked child, under the same promise as
/// [`close_in_child`], or at the start of a program, when nothing else is its own.
///
/// # Errors
///
/// As close_range(2).
pub fn close_all_but(kept: &[RawFd]) -> nix::Result<()> {
    let mut kept: Vec<u32> =
        kept.iter().filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd > 2).collect();
    kept.sort_unstable();
    let mut first = 3;
    for limit in kept.into_iter().map(Some).chain([None]) {
        let last = limit.map_or(u32::MAX, |fd| fd - 1);
        if first <= last {
            // SAFETY: closing takes numbers; nothing uses these descriptors again, as the caller promises.
            let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
            Errno::result(result)?;
        }
        first = last.saturating_add(2);
    }
    Ok(())
}

/// Closes descriptors in a forked child.
///
/// Their owners are the parent's; the child has copies of those owners, which it never drops, since it ends in
/// `_exit` or exec.
pub fn close_in_child(descriptors: &[RawFd]) {
    for descriptor in descriptors {
        // SAFETY: closing takes a number; nothing in the child uses the descriptor again, as the caller promises.
        unsafe { libc::close(*descriptor) };
    }
}

/// Makes a process the owner of a descriptor that it inherited: a forked child, under the same promise, or a program at
/// its start, once for each.
pub fn adopt(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the descriptor is open (it was in the parent), and a child's copy of the old owner is never dropped.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// Number of the last signal (signal(7)), and the size of the kernel's set of them, in bytes.
const LAST_SIGNAL: libc::c_int = 64;
const SIGNAL_SET_SIZE: usize = 8;

/// Sets every signal back to its default action and unblocks all.
///
/// The system call is made directly: whoever started us may have ignored real-time signals too, and sigaction(3)
/// refuses to touch the two that the C library keeps for itself.
///
/// # Errors
///
/// As sigaction(2) and sigprocmask(2).
pub fn reset_signals() -> nix::Result<()> {
    // The kernel's struct sigaction: a handler (0 is SIG_DFL), flags, a restorer, and a mask of 8 bytes.
    let default = [0_u64; 4];
    for signal in (1..=LAST_SIGNAL).filter(|s| !matches!(*s, libc::SIGKILL | libc::SIGSTOP)) {
        let old = std::ptr::null_mut::<u64>();
        // SAFETY: the default action runs no code of ours; `default` is at least as long as the kernel's struct.
        let result =
            unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), old, SIGNAL_SET_SIZE) };
        Errno::result(result)?;
    }
    SigSet::all().thread_unblock()
}

/// Undoes in a child what [`ignore_signal`] did to SIGPIPE, and unblocks all signals. The rest of what the process
/// does with signals ends at exec, as long as [`reset_signals`] was called at its start.
///
/// # Errors
///
/// As sigaction(2) and sigprocmask(2).
pub fn restore_signals() -> nix::Result<()> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action runs no code of ours.
    unsafe { sigaction(Signal::SIGPIPE, &default) }?;
    SigSet::all().thread_unblock()
}

/// Numbers in memory that a process shares with a child: zeros at first.
pub struct SharedNumbers {
    slots: &'static [AtomicI32],
}

impl SharedNumbers {
    /// Room for `count` numbers, for the life of the process.
    ///
    /// # Errors
    ///
    /// As mmap(2).
    pub fn new(count: usize) -> nix::Result<Self> {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        let length = count * size_of::<AtomicI32>();
        // SAFETY: a new mapping, where the kernel finds room, touches no memory that is in use.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), length, access, kind, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        // SAFETY: the mapping is page-aligned, as long as the slice, zeroed (a value of AtomicI32), and never unmapped.
        let slots = unsafe { std::slice::from_raw_parts(address.cast::<AtomicI32>(), count) };
        Ok(Self { slots })
    }

    /// The numbers.
    pub fn slots(&self) -> &[AtomicI32] {
        self.slots
    }

    /// Keeps children that are forked from now on from having the memory; they must not use this value.
    ///
    /// # Errors
    ///
    /// As madvise(2).
    pub fn hide_from_children(&self) -> nix::Result<()> {
        let (address, length) = (self.slots.as_ptr().cast_mut().cast(), size_of_val(self.slots));
        // SAFETY: the range is that of the mapping; MADV_DONTFORK changes nothing in this process.
        Errno::result(unsafe { libc::madvise(address, length, libc::MADV_DONTFORK) }).map(drop)
    }
}

/// Lets go of the pages of the program's code and constants that this process has used. What it needs again, it gets
/// again from the file in memory; what only its start needed (reading a configuration, say) it no longer has.
///
/// # Errors
///
/// As madvise(2).
pub fn let_go_of_code() -> nix::Result<()> {
    const LARGEST_PAGE: usize = 64 << 10;
    unsafe extern "C" {
        /// Where the program begins in memory, and where its code ends: ld(1) defines them, as do lld and mold.
        static __executable_start: libc::c_char;
        static etext: libc::c_char;
    }
    let (start, end) = (&raw const __executable_start, &raw const etext);
    // A whole number of pages, whatever their size is: what follows the code on its last page stays.
    let length = end.addr().saturating_sub(start.addr()) & !(LARGEST_PAGE - 1);
    // SAFETY: the linker places nothing there that can be written, so that each page is as it is in the file, and comes
    // back from there when it is next touched.
    Errno::result(unsafe { libc::madvise(start.cast_mut().cast(), length, libc::MADV_DONTNEED) }).map(drop)
}

/// Ignores a signal.
///
/// # Errors
///
/// As sigaction(2).
pub fn ignore_signal(signal: Signal) -> nix::Result<()> {
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: ignoring runs no code of ours.
    unsafe { sigaction(signal, &ignore) }.map(drop)
}

/// Sends one message with descriptors over a SOCK_SEQPACKET socket.
///
/// # Errors
///
/// As sendmsg(2); EAGAIN if the socket does not block and its buffer is full.
pub fn send_with_descriptors(socket: impl AsFd, message: &[u8], descriptors: &[RawFd]) -> nix::Result<()> {
    let rights = [ControlMessage::ScmRights(descriptors)];
    let control: &[ControlMessage] = if descriptors.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(message)], control, flags, None).map(drop)
}

/// What [`receive_with_descriptors`] got.
pub struct Received {
    /// Bytes of the message, at the start of the buffer. 0: the peer is gone.
    pub length: usize,
    /// The descriptors that came with it.
    pub descriptors: Vec<OwnedFd>,
    /// The message or its descriptors did not fit: the peer breaks the protocol.
    pub truncated: bool,
}

/// Receives one message with at most [`MAX_DESCRIPTORS`] descriptors, which are close-on-exec.
///
/// # Errors
///
/// As recvmsg(2); EAGAIN if the socket does not block and has nothing.
pub fn receive_with_descriptors(socket: impl AsFd, buffer: &mut [u8]) -> nix::Result<Received> {
    // nix's recvmsg gives nothing of a message whose descriptors could not all be received: those that were would stay
    // open for ever, so that a peer could use up our descriptors.
    let mut control = ControlBuffer([0; CONTROL_LENGTH]);
    let mut slice = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all zeros is a value of this plain structure.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut slice;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL_LENGTH as _;
    // SAFETY: the header points to two live buffers and has their lengths.
    let length =
        unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let length = Errno::result(length)?.cast_unsigned();
    let mut descriptors = Vec::new();
    // SAFETY: the kernel filled in the header and the control buffer, which is aligned for the macros. Each part has
    // as many descriptors as its length says; they were made for us, and nothing else owns them.
    unsafe {
        let mut part = libc::CMSG_FIRSTHDR(&raw const header);
        while let Some(head) = part.as_ref() {
            if (head.cmsg_level, head.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let data = libc::CMSG_DATA(part).cast::<RawFd>();
                let count = (head.cmsg_len - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                descriptors.extend((0..count).map(|at| OwnedFd::from_raw_fd(data.add(at).read_unaligned())));
            }
            part = libc::CMSG_NXTHDR(&raw const header, part);
        }
    }
    let is_cut = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    Ok(Received { length, truncated: is_cut || descriptors.len() > MAX_DESCRIPTORS, descriptors })
}

/// Room for control messages, aligned as their headers are.
#[repr(C, align(8))]
struct ControlBuffer([u8; CONTROL_LENGTH]);

/// Room for some descriptors more than [`MAX_DESCRIPTORS`]; the kernel does not open those for which there is none.
const CONTROL_LENGTH: usize = 64;

/// Registers a descriptor with the runtime.
///
/// # Errors
///
/// As epoll_ctl(2).
pub fn watch(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and stays the same descriptor until it is dropped, which the `AsyncFd` does.
    unsafe { AsyncFd::register(descriptor) }.map_err(|error| error.into_parts().1)
}

/// Opens anew, for reading, the file behind a descriptor: with an offset of its own and no right to write.
///
/// # Errors
///
/// As open(2) of /proc/self/fd/N.
pub fn reopen_for_reading(descriptor: impl AsFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", descriptor.as_fd().as_raw_fd());
    std::fs::File::open(path).map(OwnedFd::from)
}

/// The same for writing at the end of the file.
///
/// # Errors
///
/// As open(2) of /proc/self/fd/N.
pub fn reopen_for_appending(descriptor: impl AsFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", descriptor.as_fd().as_raw_fd());
    std::fs::OpenOptions::new().append(true).open(path).map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::io::{Read, Seek, SeekFrom, Write};

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
    }

    #[test]
    fn descriptors_travel_with_a_message() {
        let (left, right) = pair();
        let (read, write) = nix::unistd::pipe().unwrap();
        send_with_descriptors(&left, b"hello", &[write.as_raw_fd()]).unwrap();
        drop(write);
        let mut buffer = [0; 16];
        let mut received = receive_with_descriptors(&right, &mut buffer).unwrap();
        assert_eq!(&buffer[..received.length], b"hello");
        assert!(!received.truncated);
        let mut pipe = std::fs::File::from(received.descriptors.remove(0));
        pipe.write_all(b"x").unwrap();
        drop(pipe);
        let mut text = String::new();
        std::fs::File::from(read).read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn what_does_not_fit_is_marked() {
        let (left, right) = pair();
        let fds: Vec<RawFd> = vec![left.as_raw_fd(); MAX_DESCRIPTORS + 2];
        send_with_descriptors(&left, b"hello", &fds).unwrap();
        assert!(receive_with_descriptors(&right, &mut [0; 16]).unwrap().truncated);
        send_with_descriptors(&left, b"too long", &[]).unwrap();
        assert!(receive_with_descriptors(&right, &mut [0; 4]).unwrap().truncated);
        drop(left);
        assert_eq!(receive_with_descriptors(&right, &mut [0; 4]).unwrap().length, 0);
    }

    #[test]
    fn a_file_opened_anew_has_its_own_offset_and_cannot_be_written() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"message").unwrap();
        let mut first = std::fs::File::from(reopen_for_reading(&file).unwrap());
        let mut second = std::fs::File::from(reopen_for_reading(&file).unwrap());
        first.seek(SeekFrom::Start(4)).unwrap();
        let mut text = String::new();
        second.read_to_string(&mut text).unwrap();
        assert_eq!(text, "message");
        assert!(first.write_all(b"x").is_err());
    }
}
