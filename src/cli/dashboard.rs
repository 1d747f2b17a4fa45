//! The status of the daemon for people: aligned, no wider than a terminal, worst things in colour.
//!
//! What the document says is shown with escapes, though a worker that is taken over could only lie in it.

use std::{collections::BTreeMap, fmt::Write as _};

use crate::{
    logging::Quoted,
    status::{Event, Filters, ResolverStatus, ServiceStatus, Status, Times},
};

/// Columns of a bar.
const BAR: usize = 24;

/// Filters that are shown one by one; the eldest, which are the ones to look at.
const MAX_RUNNING: usize = 10;

/// How it is drawn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    /// With the colours of a terminal (ECMA-48, SGR).
    pub(super) color: bool,
}

impl Style {
    fn paint(self, code: &str, text: &str) -> String {
        if self.color && !text.trim().is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }

    fn title(self, text: &str) -> String {
        self.paint("1", text)
    }

    fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    fn good(self, text: &str) -> String {
        self.paint("32", text)
    }

    fn odd(self, text: &str) -> String {
        self.paint("33", text)
    }

    fn bad(self, text: &str) -> String {
        self.paint("31", text)
    }

    /// A number that should be 0.
    fn alarming(self, number: u64, width: usize) -> String {
        let text = format!("{:>width$}", grouped(number));
        if number > 0 { self.bad(&text) } else { text }
    }
}

/// Draws a look. Rates are those since the look `before`, or else since the worker started.
pub(super) fn draw(status: &Status, before: Option<&Status>, style: Style) -> String {
    let before = before.filter(|before| before.worker.pid == status.worker.pid && before.time < status.time);
    let mut drawing = Drawing { now: status, before, style, text: String::new() };
    drawing.head();
    drawing.mail();
    drawing.recipients();
    drawing.verdicts();
    drawing.filters();
    drawing.services();
    drawing.resolvers();
    drawing.spool();
    drawing.incidents();
    drawing.text
}

struct Drawing<'a> {
    now: &'a Status,
    before: Option<&'a Status>,
    style: Style,
    text: String,
}

macro_rules! line {
    ($drawing:expr, $($argument:tt)*) => {{
        let line = format!($($argument)*);
        let _ = writeln!($drawing.text, "{}", line.trim_end());
    }};
}

impl Drawing<'_> {
    /// How much of a count came in a second.
    fn rate(&self, count: impl Fn(&Status) -> u64) -> f64 {
        let (earlier, since) = match self.before {
            Some(before) => (count(before), before.time),
            None => (0, self.now.worker.started),
        };
        let seconds = (self.now.time - since).max(0.001);
        count(self.now).saturating_sub(earlier) as f64 / seconds
    }

    fn ago(&self, event: &Event) -> String {
        span(self.now.time - event.time)
    }

    fn head(&mut self) {
        let Status { version, state, configuration, monitor, worker, restarts, reloads, .. } = self.now;
        let state = match state.as_str() {
            "serving" => self.style.good("serving"),
            state => self.style.odd(&safe(state)),
        };
        let up = span(self.now.time - monitor.started);
        let title = self.style.title(&format!("usermilter {}", safe(version)));
        line!(self, "{title}  {state}, up {up}  {}", self.style.dim(&safe(configuration)));
        let mut parts = vec![
            format!("monitor {}", monitor.pid),
            format!("worker {}, up {}", worker.pid, span(self.now.time - worker.started)),
        ];
        if *restarts > 0 {
            parts.push(self.style.bad(&counted(*restarts, "restart")));
        }
        parts.push(counted(reloads.succeeded, "reload"));
        if reloads.failed > 0 {
            parts.push(self.style.odd(&format!("{} failed", grouped(reloads.failed))));
        }
        line!(self, "{}", parts.join("   "));
    }

    fn heading(&mut self, title: &str, columns: &str) {
        let (title, columns) =
            (self.style.title(&format!("{title:<20}")), self.style.dim(columns.trim_end()));
        line!(self, "");
        line!(self, "{title}{columns}");
    }

    fn per_second(&self) -> &'static str {
        if self.before.is_some() { "/s" } else { "avg/s" }
    }

    fn mail(&mut self) {
        self.heading("Mail", &format!("{:>10}{:>10}", "total", self.per_second()));
        let all: u64 = self.now.transactions.values().sum();
        for (word, shown) in
            [("accept", "accepted"), ("reject", "refused"), ("defer", "put off"), ("aborted", "given up")]
        {
            let of = |status: &Status| number(&status.transactions, word);
            let (count, rate) = (of(self.now), self.rate(of));
            let part = if all > 0 { count as f64 / all as f64 } else { 0.0 };
            let percent = if all > 0 { format!("{:>6.1} %", part * 100.0) } else { String::new() };
            line!(
                self,
                "  {shown:<18}{:>10}{:>10}  {percent:<9} {}",
                grouped(count),
                decimal(rate),
                bar(part)
            );
        }
    }

    fn recipients(&mut self) {
        let columns = ["accepted", "refused", "put off", "pending"];
        let columns: String = columns.iter().map(|column| format!("{column:>10}")).collect();
        self.heading("At RCPT TO", &format!("{columns}{:>10}", self.per_second()));
        for interface in ["milter", "policy"] {
            let of = |status: &Status, word: &str| {
                status.recipients.get(interface).map_or(0, |outcomes| number(outcomes, word))
            };
            let words = ["accept", "reject", "defer", "pending"];
            let rate = self.rate(|status| words.iter().map(|word| of(status, word)).sum());
            let counts: String =
                words.iter().map(|word| format!("{:>10}", grouped(of(self.now, word)))).collect();
            line!(self, "  {interface:<18}{counts}{:>10}", decimal(rate));
        }
    }

    fn verdicts(&mut self) {
        if self.now.verdicts.is_empty() {
            return;
        }
        let columns = ["accept", "reject", "defer", "not asked", "error"];
        let columns: String = columns.iter().map(|column| format!("{column:>10}")).collect();
        self.heading("Verdicts", &columns);
        for (source, verdicts) in &self.now.verdicts {
            let words = ["accept", "reject", "defer", "not-asked"];
            let counts: String =
                words.iter().map(|word| format!("{:>10}", grouped(number(verdicts, word)))).collect();
            let errors = self.style.alarming(number(verdicts, "error"), 10);
            line!(self, "  {:<18}{counts}{errors}", safe(source));
        }
    }

    fn filters(&mut self) {
        let Filters { running, limit, waiting, .. } = &self.now.filters;
        let part = if *limit > 0 { running.len() as f64 / *limit as f64 } else { 0.0 };
        let wait = format!("{} waiting", grouped(*waiting));
        let wait = if *waiting > 0 { self.style.odd(&wait) } else { self.style.dim(&wait) };
        line!(self, "");
        let title = self.style.title(&format!("{:<20}", "Filters"));
        line!(self, "{title}{} of {limit} running  {}  {wait}", running.len(), bar(part));
        let columns = ["runs", self.per_second(), "p50", "p90", "p99", "queue p99"];
        let columns: String = columns.iter().map(|column| format!("{column:>10}")).collect();
        line!(self, "{:<20}{}", "", self.style.dim(&columns));
        for phase in ["recipient", "message"] {
            let runs = |status: &Status| status.filters.results.get(phase).map_or(0, |r| r.values().sum());
            let (count, rate): (u64, f64) = (runs(self.now), self.rate(runs));
            let times = times(&self.now.filters.run_time, phase);
            let queued = self::times(&self.now.filters.queue_time, phase);
            line!(
                self,
                "  {phase:<18}{:>10}{:>10}{}{:>10}",
                grouped(count),
                decimal(rate),
                percentiles(&times),
                duration(&queued, queued.p99)
            );
            if let Some(results) = self.now.filters.results.get(phase) {
                let shown: Vec<String> = results.iter().map(|(result, n)| self.result(result, *n)).collect();
                line!(self, "    {}", shown.join("  "));
            }
        }
        for filter in self.now.filters.running.iter().take(MAX_RUNNING) {
            let time = format!("{:>10}", span(filter.seconds));
            let (phase, queue_id) = (safe(&filter.phase), safe(&filter.queue_id));
            line!(
                self,
                "  {} {:<29} {phase:<10}{queue_id:<16}{time}",
                self.style.good("▸"),
                safe(&filter.user)
            );
        }
        let more = self.now.filters.running.len().saturating_sub(MAX_RUNNING);
        if more > 0 {
            line!(self, "    and {more} more");
        }
    }

    fn result(&self, result: &str, count: u64) -> String {
        let text = format!("{} {}", safe(result), grouped(count));
        match result {
            "accept" | "reject" | "defer" => self.style.dim(&text),
            "gone" => self.style.odd(&text),
            _ => self.style.bad(&text),
        }
    }

    fn services(&mut self) {
        let columns = ["open", "limit", "total", self.per_second(), "refused"];
        let columns: String = columns.iter().map(|column| format!("{column:>10}")).collect();
        self.heading("Connections", &columns);
        for service in self.now.services.iter().filter(|service| !service.addresses.is_empty()) {
            let ServiceStatus { name, addresses, open, limit, accepted, refused } = service;
            let total = |status: &Status| {
                let same = status.services.iter().find(|other| other.name == *name);
                same.map_or(0, |service| service.accepted)
            };
            let rate = self.rate(total);
            let open = format!("{:>10}", grouped(*open));
            line!(
                self,
                "  {:<18}{open}{:>10}{:>10}{:>10}{}  {}",
                safe(name),
                grouped(*limit),
                grouped(*accepted),
                decimal(rate),
                self.style.alarming(*refused, 10),
                self.style.dim(&safe(&addresses.join(" ")))
            );
        }
    }

    fn resolvers(&mut self) {
        let columns = ["memory", "asked", "stale", "failed", "p50", "p99"];
        let columns: String = columns.iter().map(|column| format!("{column:>10}")).collect();
        self.heading("Resolvers", &columns);
        for (n, resolver) in self.now.resolvers.iter().enumerate() {
            let ResolverStatus { name, lookups, latency, servers } = resolver;
            let memory = number(lookups, "cache") + number(lookups, "file");
            // Its servers, if it has some, follow one by one.
            let kind = safe(name.split(' ').next().unwrap_or_default());
            line!(
                self,
                "  {} {kind:<16}{:>10}{:>10}{}{}{:>10}{:>10}",
                n + 1,
                grouped(memory),
                grouped(number(lookups, "asked")),
                self.style.alarming(number(lookups, "stale"), 10),
                self.style.alarming(number(lookups, "unavailable"), 10),
                duration(latency, latency.p50),
                duration(latency, latency.p99)
            );
            if servers.is_empty() && name.contains(' ') {
                line!(
                    self,
                    "    {}",
                    self.style.dim(&safe(name.split_once(' ').map_or("", |(_, rest)| rest)))
                );
            }
            for server in servers {
                let state = match server.state.as_str() {
                    "in use" => self.style.good("in use"),
                    "idle" => self.style.dim("idle"),
                    state => self.style.bad(&safe(state)),
                };
                let failures = match (&server.last_failure, server.failures) {
                    (_, 0) => String::new(),
                    (None, failures) => format!(", failed {} so far", counted(failures, "time")),
                    (Some(last), _) => format!(" {} ago: {}", self.ago(last), safe(&last.what)),
                };
                line!(self, "    {} {state}{failures}", safe(&server.uri));
            }
        }
    }

    fn spool(&mut self) {
        let spool = &self.now.spool;
        line!(self, "");
        let title = self.style.title(&format!("{:<20}", "Spool"));
        let (memory, disk) = (bytes(spool.memory_bytes), bytes(spool.disk_bytes));
        line!(self, "{title}{}, {memory} in memory, {disk} on disk", counted(spool.messages, "message"));
        if self.now.user_log_failures > 0 {
            let lost = counted(self.now.user_log_failures, "entry").replace("entrys", "entries");
            line!(self, "{:<20}{}", "", self.style.odd(&format!("{lost} for users' logs not written")));
        }
    }

    fn incidents(&mut self) {
        let error = self.now.reloads.last_error.iter().map(|event| ("last reload failed", event));
        let restarts = self.now.recent_restarts.iter().map(|event| ("worker died", event));
        let incidents: Vec<_> = error.chain(restarts).collect();
        if incidents.is_empty() {
            return;
        }
        line!(self, "");
        line!(self, "{}", self.style.title("Trouble"));
        for (what, event) in incidents {
            let what = self.style.bad(what);
            line!(self, "  {what} {} ago: {}", self.ago(event), safe(&event.what));
        }
    }
}

fn safe(text: &str) -> String {
    Quoted(text).to_string()
}

fn number(counts: &BTreeMap<String, u64>, word: &str) -> u64 {
    counts.get(word).copied().unwrap_or(0)
}

fn times(all: &BTreeMap<String, Times>, phase: &str) -> Times {
    all.get(phase).copied().unwrap_or_default()
}

fn percentiles(times: &Times) -> String {
    [times.p50, times.p90, times.p99]
        .iter()
        .map(|seconds| format!("{:>10}", duration(times, *seconds)))
        .collect()
}

/// A percentile; of nothing there is none.
fn duration(times: &Times, seconds: f64) -> String {
    match seconds {
        _ if times.count == 0 => "-".into(),
        s if s < 0.001 => format!("{:.0} µs", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s => format!("{s:.1} s"),
    }
}

/// How long something has lasted, in the two largest units.
fn span(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..60 => format!("{:.1} s", seconds.max(0.0)),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {} h", whole / 86_400, whole % 86_400 / 3600),
    }
}

fn bytes(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
    }
}

fn counted(count: u64, what: &str) -> String {
    format!("{} {what}{}", grouped(count), if count == 1 { "" } else { "s" })
}

fn decimal(rate: f64) -> String {
    if rate >= 100.0 { grouped(rate.round() as u64) } else { format!("{rate:.2}") }
}

/// With a comma before each three digits.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// What there is of anything is seen.
fn bar(part: f64) -> String {
    let filled = (part.clamp(0.0, 1.0) * BAR as f64).round() as usize;
    let filled = if part > 0.0 { filled.max(1) } else { 0 };
    format!("{}{}", "█".repeat(filled), "·".repeat(BAR - filled))
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use super::*;

    fn sample() -> Status {
        serde_json::from_str(include_str!("../../tests/status/sample.json")).unwrap()
    }

    /// What a terminal makes of it, as a picture. Colours are classes, so that they suit the page around it.
    fn svg(text: &str) -> String {
        const LINE: usize = 18;
        let lines: Vec<&str> = text.lines().collect();
        let height = lines.len() * LINE + 24;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" xml:space=\"preserve\" viewBox=\"0 0 900 {height}\" role=\"img\">\n\
             <title>usermilter status</title>\n<style>\n\
             text {{ font: 13px ui-monospace, 'DejaVu Sans Mono', monospace; white-space: pre; fill: #d8dee9 }}\n\
             .c1 {{ font-weight: bold; fill: #fff }} .c2 {{ fill: #8793a8 }} .c31 {{ fill: #ff7b86 }}\n\
             .c32 {{ fill: #9fd67f }} .c33 {{ fill: #f2cc72 }}\n</style>\n\
             <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#1d222c\"/>\n"
        );
        for (n, line) in lines.iter().enumerate() {
            let line = line.replace('&', "&amp;").replace('<', "&lt;").replace("\x1b[0m", "</tspan>");
            let mut parts = line.split("\x1b[");
            let mut marked = parts.next().unwrap_or_default().to_owned();
            for part in parts {
                let (code, rest) = part.split_once('m').unwrap();
                let _ = write!(marked, "<tspan class=\"c{code}\">{rest}");
            }
            let _ = writeln!(svg, "<text x=\"14\" y=\"{}\">{marked}</text>", n * LINE + 26);
        }
        svg + "</svg>\n"
    }

    #[test]
    fn the_picture_in_the_documentation_is_what_is_drawn() {
        let drawn = draw(&sample(), None, Style { color: true });
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/status.svg");
        if std::env::var_os("UPDATE").is_some() {
            fs::write(&path, svg(&drawn)).unwrap();
        }
        let picture = fs::read_to_string(&path).unwrap();
        assert_eq!(picture, svg(&drawn), "UPDATE=1 cargo test --lib picture draws it anew");
        let plain = draw(&sample(), None, Style { color: false });
        assert!(!plain.contains('\x1b') && plain.lines().all(|line| line.chars().count() <= 120), "{plain}");
    }

    #[test]
    fn rates_are_those_between_two_looks_of_one_worker() {
        let (before, mut now) = (sample(), sample());
        now.time += 10.0;
        *now.transactions.get_mut("accept").unwrap() += 25;
        let line = |before| {
            let drawn = draw(&now, before, Style { color: false });
            drawn.lines().find(|line| line.contains("accepted  ")).unwrap().to_owned()
        };
        assert!(line(Some(&before)).contains(" 2.50 "), "{}", line(Some(&before)));
        let mut other = before.clone();
        other.worker.pid += 1;
        // Of the worker's two hours.
        assert!(line(Some(&other)).contains(" 1.14 "), "{}", line(Some(&other)));
        assert_eq!(line(None), line(Some(&other)));
    }

    #[test]
    fn nothing_that_the_document_says_reaches_the_terminal_as_a_command() {
        let mut status = sample();
        status.state = "\x1b[2J".into();
        status.filters.running[0].user = "a\x1b]0;x\x07\nb".into();
        status.resolvers[1].servers[0].uri = "\x1b[31m".into();
        let drawn = draw(&status, None, Style { color: false });
        assert!(!drawn.contains('\x1b') && !drawn.contains('\x07'), "{drawn}");
    }

    #[test]
    fn numbers_and_spans_are_short() {
        assert_eq!(["0", "999", "1,000", "1,234,567"], [0, 999, 1000, 1_234_567].map(grouped));
        assert_eq!(["0.0 s", "59.9 s", "1 min 5 s"], [-1.0, 59.9, 65.4].map(span));
        assert_eq!(["2 h 1 min", "3 d 4 h"], [7290.0, 3.0 * 86_400.0 + 14_900.0].map(span));
        assert_eq!(["5 B", "2.0 KiB", "1.5 MiB"], [5, 2048, 1_572_864].map(bytes));
    }
}
