//! What the daemon is compared with: servers that do as little as can be done, each in a process of its own.

use std::ffi::CString;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::task::{Context, Poll};
use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use indymilter::{Callbacks, ProtoOpts, Status};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpListener;

use crate::accounting;
use crate::common::process::Server;
use crate::common::{PATIENCE, Sandbox, free_port, wait_until};
use crate::least::{self, Stage};
use crate::load::{self, Answered};
use crate::spawn::{self, Program};

/// A floor, as arguments of this program.
#[derive(Subcommand)]
pub(crate) enum Floor {
    /// Answers `action=DUNNO` to whatever ends in an empty line.
    Echo { port: u16 },
    /// A milter that is told everything, answers only what must be answered, and keeps nothing.
    Milter {
        port: u16,
        /// Acknowledge at once what is read: see [`Floor::prompt_milter`].
        #[arg(long)]
        prompt: bool,
    },
    /// The least milter.
    Least { stage: Stage, port: u16 },
    /// Runs a program as often as each line of its input says, and answers each line when that is done.
    Batches { at_a_time: usize, uid: u32, gid: u32, program: PathBuf },
    /// Runs a program now and then, and prints how many microseconds each run took.
    Arrivals { seconds: f64, per_second: f64, uid: u32, gid: u32, program: PathBuf },
    /// Runs a program again and again, and prints how often, and in how many seconds.
    Spawn {
        seconds: f64,
        /// Processes at a time.
        at_a_time: usize,
        uid: u32,
        gid: u32,
        program: PathBuf,
        /// Standard input, opened for each run.
        input: PathBuf,
    },
}

/// A floor that serves.
pub(crate) struct Running {
    pub(crate) address: String,
    server: Server,
}

impl Running {
    pub(crate) fn servers(&self) -> Vec<accounting::Server> {
        vec![accounting::Server { pid: self.server.pid(), name: "floor" }]
    }
}

impl Floor {
    /// Starts the echo server.
    pub(crate) fn echo() -> Running {
        start(&["echo"])
    }

    /// Starts the milter.
    pub(crate) fn milter() -> Running {
        start(&["milter"])
    }

    /// The same for Postfix, which writes a message in pieces as large as its buffer, and waits with each until the kernel
    /// has acknowledged the one before: for up to 40 ms, if it need not answer.
    pub(crate) fn prompt_milter() -> Running {
        start(&["milter", "--prompt"])
    }

    /// Starts the least milter.
    pub(crate) fn least(stage: Stage) -> Running {
        let stage = stage.to_possible_value().expect("a name");
        start(&["least", stage.get_name()])
    }

    /// Compiles and starts the milter in C; `None` without libmilter.
    pub(crate) fn libmilter(sandbox: &Sandbox) -> Option<Running> {
        let program = sandbox.join("libmilter");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bench/libmilter.c");
        let mut compile = Command::new("cc");
        compile.args(["-O2", "-o"]).arg(&program).args([source, "-lmilter", "-lpthread"]);
        if !compile.status().is_ok_and(|status| status.success()) {
            return None;
        }
        let port = free_port();
        let mut command = Command::new(program);
        command.arg(format!("inet:{port}@127.0.0.1")).stdin(Stdio::null()).stdout(Stdio::null());
        let server = Server::start(&mut command);
        Some(Running { address: wait_for_listener(port), server })
    }

    /// Runs a program as often as can be, as a user, so many at a time.
    pub(crate) fn spawn(
        duration: Duration,
        at_a_time: usize,
        (uid, gid): (u32, u32),
        program: &Path,
        input: &Path,
    ) -> Answered {
        let numbers =
            [duration.as_secs_f64().to_string(), at_a_time.to_string(), uid.to_string(), gid.to_string()];
        let output = this_program("spawn").args(numbers).arg(program).arg(input).output();
        let output = output.expect("run a floor");
        let text = String::from_utf8_lossy(&output.stdout);
        let figures: Vec<f64> = text.split_whitespace().filter_map(|figure| figure.parse().ok()).collect();
        let [count, seconds] = figures[..] else {
            panic!("no figures from the floor: {text} {}", String::from_utf8_lossy(&output.stderr))
        };
        Answered { count, seconds }
    }

    /// Runs a program at times that do not depend on how long it takes, as a user; how long each run takes from the
    /// time when it was due.
    pub(crate) fn spawn_now_and_then(
        duration: Duration,
        per_second: f64,
        (uid, gid): (u32, u32),
        program: &Path,
    ) -> Vec<Duration> {
        let numbers =
            [duration.as_secs_f64().to_string(), per_second.to_string(), uid.to_string(), gid.to_string()];
        let output = this_program("arrivals").args(numbers).arg(program).output().expect("run a floor");
        let (text, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "no figures from the floor: {errors}");
        text.lines().map(|micros| Duration::from_micros(micros.parse().expect("a number"))).collect()
    }

    /// In the floor's own process.
    pub(crate) fn run(self) {
        match self {
            Self::Echo { port } => runtime().block_on(echo(port)),
            Self::Milter { port, prompt } => runtime().block_on(milter(port, prompt)),
            Self::Least { stage, port } => least::serve(port, stage),
            Self::Batches { at_a_time, uid, gid, program } => {
                let path = CString::new(program.into_os_string().into_vec()).unwrap();
                let program = Program { path, input: c"/dev/null".into(), uid, gid };
                for line in std::io::stdin().lines() {
                    let count = line.expect("a line").parse().expect("a number");
                    spawn::run_times(&program, at_a_time, count);
                    println!("done");
                }
            }
            Self::Arrivals { seconds, per_second, uid, gid, program } => {
                let path = CString::new(program.into_os_string().into_vec()).unwrap();
                let program = Program { path, input: c"/dev/null".into(), uid, gid };
                let times = load::arrivals(per_second, Duration::from_secs_f64(seconds));
                for latency in spawn::at_times(&program, &times) {
                    println!("{}", latency.as_micros());
                }
            }
            Self::Spawn { seconds, at_a_time, uid, gid, program, input } => {
                let c_string = |path: PathBuf| CString::new(path.into_os_string().into_vec()).unwrap();
                let program = Program { path: c_string(program), input: c_string(input), uid, gid };
                let (count, elapsed) = spawn::run_for(&program, at_a_time, Duration::from_secs_f64(seconds));
                println!("{count} {}", elapsed.as_secs_f64());
            }
        }
    }
}

/// The loop, told how often it is to run.
pub(crate) struct Batches {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Batches {
    pub(crate) fn start(at_a_time: usize, (uid, gid): (u32, u32), program: &Path) -> Self {
        let numbers = [at_a_time.to_string(), uid.to_string(), gid.to_string()];
        let mut command = this_program("batches");
        command.args(numbers).arg(program).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("run a floor");
        let (input, output) = (child.stdin.take(), child.stdout.take().expect("a pipe"));
        Self { child, input, output: BufReader::new(output) }
    }

    pub(crate) fn server(&self) -> accounting::Server {
        accounting::Server { pid: self.child.id(), name: "loop" }
    }

    /// Runs the program so often while something else is done.
    pub(crate) fn run_beside(&mut self, count: usize, other: impl FnOnce()) {
        writeln!(self.input.as_mut().expect("a pipe"), "{count}").expect("a loop that listens");
        other();
        self.output.read_line(&mut String::new()).expect("a loop that answers");
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        // At the end of its input it ends.
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// Waits until somebody listens on a port of 127.0.0.1, and gives the address.
pub(crate) fn wait_for_listener(port: u16) -> String {
    let is_open = || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok();
    assert!(wait_until(PATIENCE, is_open), "nobody listens on port {port}");
    format!("inet:127.0.0.1:{port}")
}

fn start(floor: &[&str]) -> Running {
    let port = free_port();
    let mut command = this_program(floor[0]);
    command.args(&floor[1..]);
    command.arg(port.to_string()).stdin(Stdio::null()).stdout(Stdio::null());
    let server = Server::start(&mut command);
    Running { address: wait_for_listener(port), server }
}

fn this_program(floor: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("path of this program"));
    command.args(["floor", floor]);
    command
}

/// As tokio makes it for whoever asks for nothing, with a thread for each processor.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("tokio")
}

async fn echo(port: u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.expect("bind");
    loop {
        let (mut stream, _) = listener.accept().await.expect("accept");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        tokio::spawn(async move {
            let mut buffer = [0; 8192];
            while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                if buffer[..n].ends_with(b"\n\n") && stream.write_all(b"action=DUNNO\n\n").await.is_err() {
                    break;
                }
            }
        });
    }
}

async fn milter(port: u16, prompt: bool) {
    const QUIET: [ProtoOpts; 8] = [
        ProtoOpts::NOREPLY_CONNECT,
        ProtoOpts::NOREPLY_HELO,
        ProtoOpts::NOREPLY_MAIL,
        ProtoOpts::NOREPLY_DATA,
        ProtoOpts::NOREPLY_HEADER,
        ProtoOpts::NOREPLY_EOH,
        ProtoOpts::NOREPLY_BODY,
        ProtoOpts::NOREPLY_UNKNOWN,
    ];
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.expect("bind");
    let callbacks = Callbacks::<()>::new()
        .on_negotiate(|cx, _, _| {
            Box::pin(async {
                cx.requested_opts |= QUIET.into_iter().collect::<ProtoOpts>();
                Status::Continue
            })
        })
        .on_connect(|_, _, _| Box::pin(async { Status::Noreply }))
        .on_helo(|_, _: CString| Box::pin(async { Status::Noreply }))
        .on_mail(|_, _| Box::pin(async { Status::Noreply }))
        .on_rcpt(|_, _| Box::pin(async { Status::Continue }))
        .on_data(|_| Box::pin(async { Status::Noreply }))
        .on_header(|_, _, _| Box::pin(async { Status::Noreply }))
        .on_eoh(|_| Box::pin(async { Status::Noreply }))
        .on_body(|_, _| Box::pin(async { Status::Noreply }))
        .on_eom(|_| Box::pin(async { Status::Continue }));
    let never = std::future::pending::<()>();
    indymilter::run(Listener { listener, prompt }, callbacks, Default::default(), never)
        .await
        .expect("milter");
}

struct Listener {
    listener: TcpListener,
    prompt: bool,
}

struct Connection {
    stream: tokio::net::TcpStream,
    prompt: bool,
}

impl indymilter::Listener for Listener {
    type Io = Connection;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Connection>> {
        let prompt = self.prompt;
        self.listener.poll_accept(cx).map(|accepted| {
            let (stream, _) = accepted?;
            // Without it the kernel would wait to fill a segment, as it does not for the daemon.
            stream.set_nodelay(true)?;
            Ok(Connection { stream, prompt })
        })
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if self.prompt && result.is_ready() {
            self.stream.set_quickack(true)?;
        }
        result
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
