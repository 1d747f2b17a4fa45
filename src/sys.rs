//! The only unsafe code: system calls whose safety the compiler can't see.
//!
//! Each function is a thin, safe face for one call. What they build on: the monitor has one thread.
#![allow(unsafe_code)]

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
    },
    unistd::{ForkResult, Pid},
};
use tokio::io::unix::AsyncFd;

/// Most descriptors that travel with one message.
pub const MAX_DESCRIPTORS: usize = 4;

/// Most that the kernel lets travel (unix(7)).
const SCM_MAX_FD: usize = 253;

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
    // A directory per thread, beside `.` and `..`: counting its links is cheaper than reading it, as it is for each
    // filter. An unreadable /proc says nothing, and then the structure of the program must do.
    std::fs::metadata("/proc/self/task").map_or(true, |tasks| tasks.nlink() <= 3)
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

/// Makes a forked child the owner of a descriptor that it inherited, under the same promise.
pub fn adopt(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the descriptor is open (it was in the parent), and the child's copy of the old owner is never dropped.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// Sets every signal back to its default action and unblocks all.
///
/// # Errors
///
/// As sigaction(2) and sigprocmask(2).
pub fn reset_signals() -> nix::Result<()> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in Signal::iterator().filter(|s| !matches!(s, Signal::SIGKILL | Signal::SIGSTOP)) {
        // SAFETY: the default action runs no code of ours.
        unsafe { sigaction(signal, &default) }?;
    }
    SigSet::all().thread_unblock()
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
    // Room for as many as the kernel passes at most: what does not fit would be open, and known to nobody.
    let mut control = nix::cmsg_space!([RawFd; SCM_MAX_FD]);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            // SAFETY: the kernel just made these descriptors for us; nothing else owns them.
            descriptors.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(Received {
        length: message.bytes,
        truncated: message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC)
            || descriptors.len() > MAX_DESCRIPTORS,
        descriptors,
    })
}

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
