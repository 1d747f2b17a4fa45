#!/usr/bin/python3 -I
"""A hostile filter: tries whatever it can on processes, files, sockets and the message, and writes what came of it to
~/report. Each attempt is made twice, on what is its own, where it must succeed, and on what is not.

~/targets (JSON), which is waited for, says what to try; the report is a JSON list of [attempt, target, outcome]:
"ok", the name of an errno, or what went wrong otherwise."""

import ctypes, errno, fcntl, json, mmap, os, signal, socket, stat, struct, sys, time

HOME = os.environ["HOME"]
OWN_DESCRIPTORS = sorted(int(n) for n in os.listdir("/proc/self/fd"))[:-1]
MESSAGE = os.pread(0, 1 << 24, 0)
libc = ctypes.CDLL(None, use_errno=True)
report = []


def attempt(what, target, action, *arguments):
    try:
        action(*arguments)
        outcome = "ok"
    except OSError as error:
        outcome = errno.errorcode.get(error.errno, str(error))
    except Exception as error:
        outcome = repr(error)
    report.append([what, target, outcome])


def call(name, *arguments):
    ctypes.set_errno(0)
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)


def system_call(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) for a in arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), str(number))
    return result


def read(path, size=64):
    with open(path, "rb", buffering=0) as file:
        return file.read(size)


def opened(path, flags):
    os.close(os.open(path, flags))


def write(path, text):
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text)
    finally:
        os.close(descriptor)


# --- another process

PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
X86 = os.uname().machine == "x86_64"
KCMP, PROCESS_VM_READV = (312, 310) if X86 else (272, 270)
PROCESS_VM_WRITEV = PROCESS_VM_READV + 1
PIDFD_OPEN, PIDFD_GETFD, PIDFD_SEND_SIGNAL, PROCESS_MADVISE = 434, 438, 424, 440
IOPRIO_SET = 251 if X86 else 30


def seize(pid):
    call("ptrace", PTRACE_SEIZE, pid, None, None)
    # To stop it, and to wait for that, would take longer than is of use.


def pidfd(pid):
    return system_call(PIDFD_OPEN, pid, 0)


def getfd(pid):
    descriptor = pidfd(pid)
    os.close(system_call(PIDFD_GETFD, descriptor, 0, 0))


def memory(pid, number, address):
    page = ctypes.create_string_buffer(8)
    here = struct.pack("PP", ctypes.addressof(page), 8)
    there = struct.pack("PP", address, 8)
    local, remote = ctypes.create_string_buffer(here), ctypes.create_string_buffer(there)
    system_call(number, pid, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)


def on_process(name, pid, address):
    def on(what, action, *arguments):
        attempt(what, name, action, *arguments)

    proc = f"/proc/{pid}/"
    for file in ["environ", "auxv", "maps", "smaps", "io"]:
        on("read " + file, read, proc + file)
    for file in ["mem", "pagemap", "fd/0", "fd/1", "fd/2", "fdinfo/0", "root/etc/passwd"]:
        on("open " + file, opened, proc + file, os.O_RDONLY if file != "fd/1" else os.O_WRONLY)
    on("open mem for writing", opened, proc + "mem", os.O_RDWR)
    for directory in ["fd/", "cwd/", "root/", "map_files/", f"task/{pid}/fd/"]:
        on("list " + directory.replace(str(pid), "PID"), os.listdir, proc + directory)
    for link in ["exe", "cwd", "root", "ns/mnt", "fd/0"]:
        on("follow " + link, os.readlink, proc + link)
    on("write oom_score_adj", write, proc + "oom_score_adj", b"500")
    on("write coredump_filter", write, proc + "coredump_filter", b"0x33")
    on("write clear_refs", write, proc + "clear_refs", b"1")
    on("process_vm_readv", memory, pid, PROCESS_VM_READV, address)
    on("process_vm_writev", memory, pid, PROCESS_VM_WRITEV, address)
    on("pidfd_getfd", getfd, pid)
    on("kcmp", system_call, KCMP, pid, os.getpid(), 0, 0, 0)
    on("get_robust_list", system_call, 274 if X86 else 100, pid,
       ctypes.addressof(ctypes.create_string_buffer(64)), ctypes.addressof(ctypes.create_string_buffer(64)))
    on("prlimit", call, "prlimit", pid, 4, ctypes.create_string_buffer(struct.pack("QQ", 0, 0)), None)
    on("setpriority", os.setpriority, os.PRIO_PROCESS, pid, 19)
    on("sched_setaffinity", os.sched_setaffinity, pid, os.sched_getaffinity(0))
    on("sched_setscheduler", os.sched_setscheduler, pid, os.SCHED_BATCH, os.sched_param(0))
    on("ioprio_set", system_call, IOPRIO_SET, 1, pid, (3 << 13) | 7)
    on("ptrace", seize, pid)
    signals = [0, signal.SIGCONT] if name == "own" else [0] + list(range(1, 65))
    for number in signals:
        on(f"signal {number}", os.kill, pid, number)
    on("signal 0 to the group", os.killpg, pid, 0)
    on("pidfd_send_signal", system_call, PIDFD_SEND_SIGNAL, pidfd(pid), 0, 0, 0)
    if name != "own":
        on("kill the group", os.killpg, pid, signal.SIGKILL)


def victim_of_ones_own():
    """A process like another user's filter: a session of its own, a file to read and a pipe to write to."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(os.open(__file__, os.O_RDONLY), 0)
        for number in [1, 2]:
            os.dup2(done, number)
        os.write(done, b"x")
        while True:
            time.sleep(60)
    os.read(ready, 1)
    os.close(ready)
    os.close(done)
    return pid


# --- the message, and what is like it

def on_message(name, descriptor):
    def on(what, action, *arguments):
        attempt(what, name, action, *arguments)

    for path in [f"/proc/self/fd/{descriptor}", f"/dev/fd/{descriptor}", f"/proc/{os.getpid()}/fd/{descriptor}"]:
        on("open for writing " + path.replace(str(os.getpid()), "PID").rsplit("/", 1)[0], opened, path, os.O_WRONLY)
    path = f"/proc/self/fd/{descriptor}"
    on("open for both", opened, path, os.O_RDWR)
    on("open and truncate", opened, path, os.O_RDONLY | os.O_TRUNC)
    on("open and append", opened, path, os.O_WRONLY | os.O_APPEND)
    on("write", os.write, descriptor, b"")
    on("write something", os.pwrite, descriptor, b"x", 0)
    on("truncate", os.truncate, path, len(MESSAGE))
    on("ftruncate", os.ftruncate, descriptor, len(MESSAGE))
    on("fallocate", os.posix_fallocate, descriptor, 0, 1)
    on("punch a hole", call, "fallocate", descriptor, 3, ctypes.c_long(0), ctypes.c_long(1))
    on("map", mmap.mmap, descriptor, 1, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    on("change a map's protection", protect, descriptor)
    on("change the mode", os.fchmod, descriptor, 0o444)
    on("give away", os.fchown, descriptor, os.getuid(), -1)
    on("set times", os.utime, descriptor, (0, 0))
    on("seal", fcntl.fcntl, descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)


def protect(descriptor):
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, mmap.MAP_SHARED, descriptor, ctypes.c_long(0))
    call("mprotect", ctypes.c_void_p(address), ctypes.c_size_t(4096), mmap.PROT_READ | mmap.PROT_WRITE)


def link_message(name, descriptor):
    here, follow = -100, 0x400
    attempt("give a name", name, call, "linkat", here, f"/proc/self/fd/{descriptor}".encode(),
            here, f"{HOME}/name-{name}".encode(), follow)


# --- files, directories and sockets

def on_file(name, path):
    attempt("read a file", name, read, path)
    attempt("write a file", name, opened, path, os.O_WRONLY)
    attempt("change a file's mode", name, os.chmod, path, 0o600)
    attempt("rename a file", name, lambda: (os.rename(path, path + ".moved"), os.rename(path + ".moved", path)))


def on_directory(name, path):
    attempt("list a directory", name, os.listdir, path)
    attempt("enter a directory", name, os.chdir, path)
    os.chdir(HOME)
    attempt("make a file in a directory", name, opened, path + "/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    attempt("change a directory's mode", name, os.chmod, path, 0o700)


def on_socket(name, path):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        attempt("connect to a socket", name, client.connect, path)
    attempt("change a socket's mode", name, os.chmod, path, 0o600)


# --- what is there to be seen

def sweep(secrets):
    """Every process of others: which have an environment or descriptors to be read, and which have any of these in a
    file that anybody may read."""
    seen = {"environ": 0, "fd": 0, "cmdline": 0}
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat("/proc/" + pid).st_uid == os.getuid():
                continue
        except OSError:
            continue
        for file in ["environ", "mem", "maps", "stack", "syscall", "cmdline", "status", "stat", "comm", "limits",
                     "cgroup", "mountinfo", "wchan", "sched", "io", "numa_maps", "net/unix"]:
            try:
                text = read(f"/proc/{pid}/{file}", 1 << 16)
            except OSError:
                continue
            # Those of the kernel's own threads are there for all, and empty.
            seen[file] = seen.get(file, 0) + bool(text)
            found.update(f"{file}: {secret}" for secret in secrets if secret.encode() in text)
        try:
            os.listdir(f"/proc/{pid}/fd/")
            seen["fd"] += 1
        except OSError:
            pass
    return seen, sorted(found)


def main():
    deadline = time.monotonic() + 60
    while not os.path.exists(HOME + "/targets") and time.monotonic() < deadline:
        time.sleep(0.02)
    with open(HOME + "/targets") as file:
        targets = json.load(file)
    own = victim_of_ones_own()
    # The child has the same addresses.
    scratch = ctypes.create_string_buffer(64)
    for name, pid in [("own", own)] + sorted(targets["processes"].items()):
        on_process(name, pid, ctypes.addressof(scratch))
    os.kill(own, signal.SIGKILL)

    mine = os.memfd_create("mine", os.MFD_ALLOW_SEALING)
    os.write(mine, MESSAGE)
    on_message("own", mine)
    on_message("message", 0)
    file = os.open(HOME, os.O_TMPFILE | os.O_RDWR)
    link_message("own", file)
    link_message("message", 0)

    with open(HOME + "/file", "w") as file:
        file.write("mine\n")
    os.mkdir(HOME + "/directory")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(HOME + "/socket")
    listener.listen()
    on_file("own", HOME + "/file")
    on_directory("own", HOME + "/directory")
    on_socket("own", HOME + "/socket")
    for path in targets["files"]:
        on_file(path, path)
    for path in targets["directories"]:
        on_directory(path, path)
    for path in targets["sockets"]:
        on_socket(path, path)

    seen, found = sweep(targets["secrets"])
    status = read("/proc/self/status", 1 << 16).decode()
    result = {
        "attempts": report,
        "descriptors": OWN_DESCRIPTORS,
        "input": os.readlink("/proc/self/fd/0"),
        "status": dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line),
        "session": os.getsid(0) == os.getpid() == os.getpgrp(),
        "limits": read("/proc/self/limits", 1 << 16).decode(),
        "environment": dict(os.environ),
        "message": MESSAGE.decode(),
        "seen": seen,
        "found": found,
        "spool": os.listdir(targets["spool"]),
    }
    with open(HOME + "/report.new", "w") as file:
        json.dump(result, file)
    os.rename(HOME + "/report.new", HOME + "/report")


try:
    main()
except BaseException:
    import traceback
    with open(HOME + "/failure", "w") as file:
        traceback.print_exc(file=file)
sys.exit(77)
