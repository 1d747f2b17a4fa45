//! `usermilter status`: asks the running daemon what it is doing.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};

use super::{CONFIG, ConfigArguments, SOFTWARE, UNAVAILABLE, dashboard};
use crate::{
    config::{Config, DEFAULT_PATH},
    logging::{Chain, Quoted},
    status::Status,
};

/// How long an answer may take.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// Longest document, in bytes: thousands of filters that run at a time.
const MAX_LENGTH: usize = 16 << 20;

const HELP: &str = "\
The daemon is asked on its control socket, server.control of the configuration, which is open to root and to the
group of the socket. Counts are since the worker started, which is anew after each reload; rates are averages over that
time, or with --watch over the time between two looks.

Examples:
  usermilter status                     one look
  usermilter status --watch             follow, a look every 2 seconds
  usermilter status --json | jq '.filters.running[] | select(.seconds > 30)'

Exit status:
   0  shown
  64  wrong usage
  69  no daemon can be reached, or it does not let you
  70  trouble of ours
  78  the configuration has a fault";

/// Show what the running daemon is doing: mail, filters, connections, resolvers, and what went wrong.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// Ask on this socket, whatever the configuration says.
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    socket: Option<PathBuf>,
    /// Print the document as JSON, one line for each look.
    #[arg(long)]
    json: bool,
    /// Look again every so many seconds (2 if none are given), until interrupted. On a terminal the display is redrawn,
    /// elsewhere each look is appended.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    watch: Option<u64>,
}

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
enum StatusError {
    #[error("server.control is \"off\": this daemon can't be asked")]
    Off,
    #[error("{0} exists, but you may not connect to it: be root, or of its group")]
    NotAllowed(String),
    #[error(
        "no daemon answers on {path}; is `usermilter serve` running? If it has another configuration, name that with --config, or \
         its socket with --socket"
    )]
    NotThere { path: String, source: io::Error },
    #[error("the daemon on {0} gives no answer in {TIME_LIMIT:?}")]
    Slow(String),
    #[error("cannot ask the daemon")]
    Http(#[from] hyper::Error),
    #[error("the answer of the daemon can't be read: {0}")]
    Answer(String),
}

pub(super) fn run(arguments: &Arguments) -> ExitCode {
    let path = match control_socket(arguments) {
        Ok(Some(path)) => path,
        Ok(None) => return failed(&StatusError::Off),
        Err(status) => return status,
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("usermilter: {error}");
            return ExitCode::from(SOFTWARE);
        }
    };
    let mut display = Display::new(arguments);
    loop {
        let shown = match runtime.block_on(ask(&path)) {
            Ok(text) => display.show(text),
            Err(error) if arguments.watch.is_none() => Err(error),
            // It may be about to come back.
            Err(error) => display.show_trouble(&error),
        };
        match (shown, arguments.watch) {
            (Err(error), _) => return failed(&error),
            // Whoever read along has had enough.
            (Ok(false), _) | (Ok(true), None) => return ExitCode::SUCCESS,
            (Ok(true), Some(seconds)) => thread::sleep(Duration::from_secs(seconds)),
        }
    }
}

fn failed(error: &StatusError) -> ExitCode {
    eprintln!("usermilter: {}", Quoted(&Chain(error).to_string()));
    ExitCode::from(UNAVAILABLE)
}

/// Where to ask. Of the configuration nothing else is looked at: whoever may ask need not be able to read passwords.
fn control_socket(arguments: &Arguments) -> Result<Option<PathBuf>, ExitCode> {
    if let Some(path) = &arguments.socket {
        return Ok(Some(path.clone()));
    }
    let named = arguments.config.config.as_deref();
    let path = named.unwrap_or(Path::new(DEFAULT_PATH));
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => {
            eprintln!("usermilter: cannot read configuration file {}: {error}", path.display());
            return Err(ExitCode::from(CONFIG));
        }
    };
    match Config::parse(&text, path) {
        Ok(config) => Ok(config.server.control.0),
        Err(error) => {
            eprintln!("usermilter: {}", Chain(&error));
            Err(ExitCode::from(CONFIG))
        }
    }
}

/// The document as the daemon writes it.
async fn ask(path: &Path) -> Result<String, StatusError> {
    let shown = path.display().to_string();
    let answer = timeout(TIME_LIMIT, async {
        let stream = UnixStream::connect(path).await.map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => StatusError::NotAllowed(shown.clone()),
            _ => StatusError::NotThere { path: shown.clone(), source },
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let mut request = Request::get("/status").body(Empty::<Bytes>::new()).map_err(unreadable)?;
        request.headers_mut().insert(HOST, hyper::header::HeaderValue::from_static("usermilter"));
        let response = sender.send_request(request).await?;
        if response.status() != StatusCode::OK {
            return Err(StatusError::Answer(response.status().to_string()));
        }
        let body = Limited::new(response.into_body(), MAX_LENGTH).collect().await.map_err(unreadable)?;
        connection.abort();
        String::from_utf8(body.to_bytes().into()).map_err(unreadable)
    });
    answer.await.unwrap_or(Err(StatusError::Slow(shown.clone())))
}

fn unreadable(error: impl ToString) -> StatusError {
    StatusError::Answer(error.to_string())
}

/// Where looks are shown.
struct Display {
    as_json: bool,
    /// Redrawn in place.
    in_place: bool,
    style: dashboard::Style,
    before: Option<Status>,
    is_first: bool,
}

impl Display {
    fn new(arguments: &Arguments) -> Self {
        let terminal = io::stdout().is_terminal();
        // https://no-color.org
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            as_json: arguments.json,
            in_place: terminal && arguments.watch.is_some() && !arguments.json,
            style: dashboard::Style { color: terminal && !no_color },
            before: None,
            is_first: true,
        }
    }

    /// False if nobody reads any more.
    fn show(&mut self, text: String) -> Result<bool, StatusError> {
        if self.as_json {
            return Ok(Self::write(&format!("{text}\n")));
        }
        let status: Status = serde_json::from_str(&text).map_err(unreadable)?;
        let drawn = dashboard::draw(&status, self.before.as_ref(), self.style);
        self.before = Some(status);
        Ok(self.put(&drawn))
    }

    fn show_trouble(&mut self, error: &StatusError) -> Result<bool, StatusError> {
        let text = Quoted(&Chain(error).to_string()).to_string();
        if self.in_place {
            Ok(self.put(&format!("{text}\n")))
        } else {
            eprintln!("usermilter: {text}");
            Ok(true)
        }
    }

    fn put(&mut self, text: &str) -> bool {
        let first = std::mem::take(&mut self.is_first);
        if self.in_place {
            // Home; each line cleared to its end, and what was below them (ECMA-48, ED and EL).
            let start = if first { "\x1b[2J\x1b[H" } else { "\x1b[H" };
            Self::write(&format!("{start}{}\x1b[J", text.replace('\n', "\x1b[K\n")))
        } else {
            let separator = if first { "" } else { "\n" };
            Self::write(&format!("{separator}{text}"))
        }
    }

    fn write(text: &str) -> bool {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
    }
}
