//! `server.metrics`: counts are exact, the page is OpenMetrics, health checks tell the truth, and those who watch get in
//! nobody's way.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod common;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use common::policy::{self, Request};
use common::site::SiteBuilder;
use common::{PATIENCE, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use watch::{SENDER, Watched, get, open, request};

fn series<const N: usize>(series: [(&str, u64); N]) -> BTreeMap<&str, u64> {
    BTreeMap::from(series)
}

/// Ten mails to alice, of whose filter six accept or are in error, two to bob, one to carol.
fn traffic(watched: &Watched) {
    for (subject, count, code) in
        [("good", 3, 250), ("refuse", 2, 550), ("later", 1, 451), ("fail", 2, 250), ("kill", 2, 250)]
    {
        for sent in watched.send("alice", subject, count) {
            assert_eq!(sent.outcome().code, code, "{subject}");
        }
    }
    for sent in watched.send("bob", "never", 2) {
        assert_eq!(sent.recipients[0].code, 550);
    }
    watched.send("carol", "hello", 1);
}

#[test]
fn what_came_through_postfix_is_counted_exactly() {
    let watched = Watched::start(|site| site);
    traffic(&watched);
    let metrics = watched.metrics_when("13 transactions", |metrics| {
        metrics.counted("transactions").values().sum::<u64>() == 13
    });
    assert_eq!(
        metrics.counted("transactions"),
        series([
            (r#"{interface="milter",outcome="accept"}"#, 8),
            (r#"{interface="milter",outcome="reject"}"#, 2),
            (r#"{interface="milter",outcome="defer"}"#, 1),
            // bob's: no recipient was left.
            (r#"{interface="milter",outcome="aborted"}"#, 2),
        ])
    );
    assert_eq!(
        metrics.counted("recipients"),
        series([
            (r#"{interface="milter",outcome="pending"}"#, 10),
            (r#"{interface="milter",outcome="accept"}"#, 1),
            (r#"{interface="policy",outcome="pending"}"#, 10),
            (r#"{interface="policy",outcome="accept"}"#, 1),
            // What the policy service refuses the milter never sees.
            (r#"{interface="policy",outcome="reject"}"#, 2),
        ])
    );
    assert_eq!(
        metrics.counted("filter_runs"),
        series([
            (r#"{phase="message",result="accept"}"#, 3),
            (r#"{phase="message",result="reject"}"#, 2),
            (r#"{phase="message",result="defer"}"#, 1),
            (r#"{phase="message",result="exit-status"}"#, 2),
            (r#"{phase="message",result="signal"}"#, 2),
        ])
    );
    assert_eq!(
        metrics.counted("verdicts"),
        series([
            (r#"{interface="milter",verdict="accept",source="message-filter"}"#, 3),
            (r#"{interface="milter",verdict="reject",source="message-filter"}"#, 2),
            (r#"{interface="milter",verdict="defer",source="message-filter"}"#, 1),
            (r#"{interface="milter",verdict="error",source="message-filter"}"#, 4),
            (r#"{interface="milter",verdict="accept",source="nothing"}"#, 1),
            (r#"{interface="policy",verdict="not-asked",source="message-filter"}"#, 10),
            (r#"{interface="policy",verdict="reject",source="rules"}"#, 2),
            (r#"{interface="policy",verdict="accept",source="nothing"}"#, 1),
        ])
    );
    assert_eq!(metrics.value(r#"filter_run_seconds_count{phase="message"}"#), 10.0);
    assert!(metrics.value(r#"filter_run_seconds_sum{phase="message"}"#) > 0.0);
    assert_eq!(metrics.value(r#"filter_queue_seconds_count{phase="message"}"#), 10.0);
    // One for each recipient and service.
    let lookups = r#"resolver_lookups_total{resolver="1",type="passwd-file",source="file"}"#;
    assert_eq!(metrics.value(lookups), 24.0);
    // Messages are gone with their last reader.
    let metrics = watched.metrics_when("an empty spool", |metrics| metrics.value("spool_messages") == 0.0);
    for sample in [
        r#"spool_bytes{place="memory"}"#,
        r#"spool_bytes{place="disk"}"#,
        "filters_running",
        "filters_waiting",
        "worker_restarts_total",
        "reloads_total",
        "user_log_failures_total",
    ] {
        assert_eq!(metrics.value(sample), 0.0, "{sample}");
    }
    assert!(metrics.value(r#"connections_total{interface="milter"}"#) >= 1.0);
    assert!(metrics.value(r#"connections_total{interface="policy"}"#) >= 1.0);
    assert_eq!(metrics.value("filters_limit"), 64.0);
}

#[test]
fn recipient_filters_and_timeouts_are_counted_by_kind() {
    let watched = Watched::start(|site| {
        let site = site.filter("carol", "recipient", "#!/bin/sh\nexit 77\n");
        let site = site.filter("bob", "message", "#!/no/such/interpreter\n");
        site.users.file("bob", "rules.toml", "");
        site.set("filter", "timeout", "\"1s\"")
    });
    assert_eq!(watched.send("carol", "hello", 1)[0].recipients[0].code, 550);
    assert_eq!(watched.send("alice", "wait", 1)[0].outcome().code, 250);
    assert_eq!(watched.send("bob", "hello", 1)[0].outcome().code, 250);
    let metrics = watched.metrics_when("three filters", |metrics| {
        metrics.counted("filter_runs").values().sum::<u64>() == 3
            && metrics.counted("transactions").values().sum::<u64>() == 3
    });
    assert_eq!(
        metrics.counted("filter_runs"),
        series([
            (r#"{phase="recipient",result="reject"}"#, 1),
            (r#"{phase="message",result="timeout"}"#, 1),
            (r#"{phase="message",result="not-executable"}"#, 1),
        ])
    );
    assert!(metrics.value(r#"filter_run_seconds_bucket{le="0.5",phase="message"}"#) < 2.0, "{metrics:?}");
    let refused = r#"verdicts_total{interface="policy",verdict="reject",source="recipient-filter"}"#;
    assert_eq!(metrics.value(refused), 1.0);
}

#[test]
fn a_filter_that_runs_and_its_message_are_seen_until_it_ends() {
    let watched = Watched::start(|site| site);
    thread::scope(|scope| {
        let sent = scope.spawn(|| watched.send("alice", "wait", 1));
        let metrics = watched.metrics_when("a filter", |metrics| metrics.value("filters_running") == 1.0);
        assert_eq!(metrics.value("spool_messages"), 1.0);
        assert!(metrics.value(r#"spool_bytes{place="memory"}"#) > 100.0);
        assert!(metrics.value(r#"connections_open{interface="milter"}"#) >= 1.0);
        watched.go();
        assert_eq!(sent.join().unwrap()[0].outcome().code, 250);
    });
    let metrics = watched.metrics_when("none", |metrics| metrics.value("filters_running") == 0.0);
    assert_eq!(metrics.value("spool_messages"), 0.0);
    assert_eq!(metrics.value(r#"spool_bytes{place="memory"}"#), 0.0);
}

#[test]
fn a_large_message_is_counted_on_disk() {
    let watched = Watched::start(|site| site.set("filter", "memory-limit", "\"1K\""));
    thread::scope(|scope| {
        let sent = scope.spawn(|| {
            let message = format!("Subject: wait\n\n{}", "0123456789012345678901234567890\n".repeat(1000));
            watched.client().send(SENDER, &["alice@test.example"], message.as_bytes())
        });
        let metrics = watched.metrics_when("a filter", |metrics| metrics.value("filters_running") == 1.0);
        assert!(metrics.value(r#"spool_bytes{place="disk"}"#) > 32_000.0);
        assert_eq!(metrics.value(r#"spool_bytes{place="memory"}"#), 0.0);
        watched.go();
        assert_eq!(sent.join().unwrap().outcome().code, 250);
    });
    watched.metrics_when("an empty disk", |metrics| metrics.value(r#"spool_bytes{place="disk"}"#) == 0.0);
}

#[test]
fn filters_that_wait_for_room_are_seen() {
    let watched = Watched::start(|site| site.set("filter", "max-processes-per-user", "1"));
    thread::scope(|scope| {
        let sessions: Vec<_> = (0..3).map(|_| scope.spawn(|| watched.send("alice", "wait", 1))).collect();
        watched.metrics_when("two that wait", |metrics| {
            metrics.value("filters_running") == 1.0 && metrics.value("filters_waiting") == 2.0
        });
        watched.go();
        sessions.into_iter().for_each(|session| drop(session.join().unwrap()));
    });
    let metrics = watched.metrics_when("nobody", |metrics| metrics.value("filters_waiting") == 0.0);
    let counted = metrics.value(r#"filter_queue_seconds_count{phase="message"}"#);
    let at_once = metrics.value(r#"filter_queue_seconds_bucket{le="0.0001",phase="message"}"#);
    assert!(counted == 3.0 && at_once <= 1.0, "{metrics:?}");
}

#[test]
fn a_killed_worker_and_each_reload_are_counted_and_the_socket_stays() {
    let mut watched = Watched::start(|site| site);
    watched.send("carol", "hello", 1);
    let started = watched.metrics().value("worker_start_time_seconds");
    let worker = watched.site.daemon.worker_pid();
    kill(Pid::from_raw(worker.cast_signed()), Signal::SIGKILL).unwrap();
    let metrics = watched.metrics_when("a new worker", |m| m.value("worker_restarts_total") == 1.0);
    // A worker begins at zero; what the monitor knows goes on.
    assert_eq!(metrics.counted("transactions"), series([]));
    assert!(metrics.value("worker_start_time_seconds") > started);
    assert!(metrics.value("start_time_seconds") <= started);

    watched.site.daemon.reload();
    watched.metrics_when("a reload", |metrics| metrics.value("reloads_total") == 1.0);
    let good = fs::read_to_string(watched.site.daemon.config_path()).unwrap();
    watched.site.daemon.write_config("nonsense");
    watched.site.daemon.reload();
    let metrics = watched.metrics_when("a reload that fails", |m| m.value("reload_failures_total") == 1.0);
    assert_eq!(metrics.value("last_reload_successful"), 0.0);
    assert_eq!((metrics.value("reloads_total"), metrics.value("worker_restarts_total")), (1.0, 1.0));
    watched.site.daemon.write_config(&good);
    watched.site.daemon.reload();
    let metrics = watched.metrics_when("a second reload", |metrics| metrics.value("reloads_total") == 2.0);
    assert_eq!(metrics.value("last_reload_successful"), 1.0);
    assert_eq!(metrics.value("reload_failures_total"), 1.0);
    assert_eq!(metrics.value("worker_restarts_total"), 1.0);
}

#[test]
fn no_scrape_fails_while_the_configuration_is_reloaded() {
    let mut watched = Watched::start(|site| site);
    let port = watched.port;
    for n in 1..=3 {
        let done = std::sync::atomic::AtomicBool::new(false);
        thread::scope(|scope| {
            let scraper = scope.spawn(|| {
                let mut scrapes = 0;
                loop {
                    assert_eq!(get(port, "/metrics").unwrap().status, 200);
                    assert_eq!(get(port, "/readyz").unwrap().status, 200);
                    scrapes += 1;
                    if done.load(std::sync::atomic::Ordering::Relaxed) {
                        return scrapes;
                    }
                }
            });
            watched.site.daemon.reload();
            watched.metrics_when("a reload", |metrics| metrics.value("reloads_total") == f64::from(n));
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(scraper.join().unwrap() > 0);
        });
    }
}

#[test]
fn health_checks_and_pages_are_there_for_get_and_head_alone() {
    let watched = Watched::start(|site| site);
    for (method, path, status, body) in [
        ("GET", "/healthz", 200, "alive\n"),
        ("GET", "/readyz", 200, "ready\n"),
        ("HEAD", "/healthz", 200, ""),
        ("HEAD", "/readyz", 200, ""),
        ("HEAD", "/metrics", 200, ""),
        ("GET", "/", 404, "not found\n"),
        ("GET", "/metrics/", 404, "not found\n"),
        // Names are for the control socket.
        ("GET", "/status", 404, "not found\n"),
        ("POST", "/metrics", 405, "method not allowed\n"),
        ("DELETE", "/healthz", 405, "method not allowed\n"),
    ] {
        let page = request(watched.port, method, path).unwrap();
        assert_eq!((page.status, page.body.as_str()), (status, body), "{method} {path}");
        assert_eq!(page.field("allow"), (status == 405).then_some("GET, HEAD"));
    }
    let length = |method| {
        request(watched.port, method, "/healthz").unwrap().field("content-length").map(str::to_owned)
    };
    assert_eq!(length("HEAD"), length("GET"));
}

#[test]
fn while_it_drains_it_is_alive_and_not_ready_and_still_counts() {
    let mut watched = Watched::start(|site| site.set("server", "drain-timeout", "\"60s\""));
    let sent = thread::scope(|scope| {
        let sent = scope.spawn(|| watched.send("alice", "wait", 1));
        watched.metrics_when("a filter", |metrics| metrics.value("filters_running") == 1.0);
        let monitor = Pid::from_raw(watched.site.daemon.pid().cast_signed());
        kill(monitor, Signal::SIGTERM).unwrap();
        let draining = || get(watched.port, "/readyz").is_ok_and(|page| page.status == 503);
        assert!(wait_until(PATIENCE, draining));
        assert_eq!(get(watched.port, "/healthz").unwrap().status, 200);
        assert_eq!(watched.metrics().value("filters_running"), 1.0);
        let document = watched.document();
        assert_eq!(document["state"], "draining");
        watched.go();
        sent.join().unwrap()
    });
    assert_eq!(sent[0].outcome().code, 250);
    assert!(watched.site.daemon.terminate_without_signal().success());
    assert!(get(watched.port, "/healthz").is_err());
    assert!(!watched.control.exists());
}

#[test]
fn those_who_send_nothing_or_half_a_request_hold_up_neither_mail_nor_each_other_for_long() {
    let watched = Watched::start(|site| site);
    // All places, and some more: half of them silent, half with a request that does not end.
    let mut holders: Vec<TcpStream> = (0..40)
        .map(|n| open(watched.port, if n % 2 == 0 { b"" } else { b"GET /metrics HTTP/1.1\r\nHos" }).unwrap())
        .collect();
    assert!(wait_until(PATIENCE, || get(watched.port, "/healthz").is_err()), "there is always room");
    for sent in watched.send("alice", "good", 3) {
        assert_eq!(sent.outcome().code, 250);
    }
    let mut client = policy::Client::connect(watched.site.policy_address());
    assert_eq!(client.ask(&Request::rcpt(SENDER, "alice@test.example")), "DUNNO");
    // The control socket has places of its own.
    let document = watched.document();
    assert_eq!(document["transactions"]["accept"], 3);
    let metrics = &document["services"][2];
    assert_eq!((metrics["name"].as_str(), metrics["open"].as_u64()), (Some("metrics"), Some(32)));
    assert!(metrics["refused"].as_u64().unwrap() >= 8);
    // They are put out, though none of them leaves.
    watched.metrics_when("room again", |metrics| {
        metrics.value(r#"connections_open{interface="metrics"}"#) == 1.0
    });
    for holder in &mut holders {
        let mut rest = Vec::new();
        let _ = holder.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest));
    }
}

#[test]
fn a_request_that_is_none_or_too_long_is_refused() {
    let watched = Watched::start(|site| site);
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(100_000));
    let fields = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(200));
    for bytes in ["\0\x01\x02\r\n\r\n", "HELO there\r\n\r\n", "\r\n\r\nGET\r\n\r\n", &long, &fields] {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, watched.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // It may be refused before all of it is sent.
        let _ = stream.write_all(bytes.as_bytes());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let refused = answer.is_empty() || answer.starts_with("HTTP/1.1 4");
        assert!(refused && !answer.contains("usermilter_"), "{answer}");
    }
    assert_eq!(get(watched.port, "/healthz").unwrap().status, 200);
}

/// Reads the page with the parser of Prometheus' own client library, and prints each sample with its labels.
const PARSER: &str = "\
import json, sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families
families = list(text_string_to_metric_families(sys.stdin.read()))
json.dump({f.name: {'type': f.type, 'unit': f.unit, 'help': f.documentation,
  'samples': [[s.name, s.labels, s.value] for s in f.samples]} for f in families}, sys.stdout)
";

/// The page as a reader of the standard understands it.
#[track_caller]
fn parsed(text: &str) -> Value {
    // Not one that somebody has put in front of it: the library is Debian's.
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-c", PARSER]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut python = python.spawn().expect("python3: run tests/install-dependencies");
    python.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// One of each type; nobody serves the directory.
fn with_all_resolvers(site: SiteBuilder) -> SiteBuilder {
    let resolvers = format!(
        "[[resolver]]\ntype = \"passwd-file\"\npath = \"{}\"\n[[resolver]]\ntype = \"passwd\"\n\
         [[resolver]]\ntype = \"ldap\"\nuri = [\"ldap://127.0.0.1:{}\", \"ldap://127.0.0.1:{}\"]\nbase = \"dc=example\"\n\
         filter = \"(mail=%s)\"\n",
        site.users.passwd_file().display(),
        common::free_port(),
        common::free_port(),
    );
    site.resolvers(resolvers)
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Words that begin as all of our names do.
fn names_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("usermilter_")).map(str::to_owned).collect()
}

/// Every `expr` below a value.
fn expressions(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match (key.as_str(), value) {
                    ("expr", Value::String(text)) => found.push(text.clone()),
                    _ => expressions(value, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| expressions(value, found)),
        _ => (),
    }
}

#[test]
fn the_page_is_open_metrics_and_dashboard_alerts_and_document_speak_of_what_is_there() {
    let watched = Watched::start(with_all_resolvers);
    traffic(&watched);
    // Whom nobody has is looked for everywhere.
    let sent = watched.send("ghost", "hello", 1);
    assert_eq!(sent[0].recipients[0].code, 451, "{sent:?}");
    let metrics = watched.metrics();
    assert!(metrics.value(r#"resolver_latency_seconds_count{resolver="2",type="passwd"}"#) > 0.0);
    assert!(metrics.value(r#"resolver_lookups_total{resolver="2",type="passwd",source="asked"}"#) > 0.0);
    let unavailable = r#"resolver_lookups_total{resolver="3",type="ldap",source="unavailable"}"#;
    assert!(metrics.value(unavailable) > 0.0);
    for server in [1, 2] {
        assert!(metrics.value(&format!(r#"ldap_failures_total{{resolver="3",server="{server}"}}"#)) > 0.0);
    }
    let page = get(watched.port, "/metrics").unwrap();
    assert_eq!(
        page.field("content-type"),
        Some("application/openmetrics-text; version=1.0.0; charset=utf-8")
    );
    assert!(page.body.ends_with("\n# EOF\n"));
    let families = parsed(&page.body);
    let families = families.as_object().unwrap();
    assert!(families.len() > 20, "{families:?}");

    let (mut there, mut bases) = (BTreeSet::new(), BTreeSet::new());
    for (family, about) in families {
        assert!(family.starts_with("usermilter_"), "{family}");
        assert!(about["help"].as_str().is_some_and(|help| help.len() > 5), "{family}");
        let unit = about["unit"].as_str().unwrap();
        assert!(unit.is_empty() || family.ends_with(&format!("_{unit}")), "{family}: {unit}");
        bases.insert(family.clone());
        for sample in about["samples"].as_array().unwrap() {
            there.insert(sample[0].as_str().unwrap().to_owned());
            for (label, value) in sample[1].as_object().unwrap() {
                // Words of ours and numbers; an address, or a name of the traffic, is neither.
                let value = value.as_str().unwrap();
                assert!(
                    label == "version"
                        || label == "le"
                        || value.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'),
                    "{family}: {label}={value:?}"
                );
                for name in ["alice", "bob", "carol", "stranger", "sender", "192"] {
                    assert!(!value.contains(name), "{family}: {label}={value:?}");
                }
            }
        }
    }

    let dashboard: Value =
        serde_json::from_str(&fs::read_to_string(root().join("docs/grafana.json")).unwrap()).unwrap();
    for key in ["title", "uid", "schemaVersion", "panels", "templating", "time", "version"] {
        assert!(!dashboard[key].is_null(), "docs/grafana.json has no {key}");
    }
    let (mut ids, mut asked) = (BTreeSet::new(), Vec::new());
    for panel in dashboard["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "two panels with one id");
        let place = &panel["gridPos"];
        let number = |key: &str| place[key].as_u64().unwrap_or_else(|| panic!("{panel}"));
        assert!(number("x") + number("w") <= 24 && number("h") > 0, "{panel}");
        assert!(panel["title"].is_string() && panel["type"].is_string(), "{panel}");
        let mut own = Vec::new();
        expressions(panel, &mut own);
        assert!(panel["type"] == "row" || !own.is_empty(), "{panel}");
        asked.extend(own);
    }
    assert!(asked.len() > 15);
    let alerts = fs::read_to_string(root().join("docs/alerts.yaml")).unwrap();
    let mut used = BTreeSet::new();
    for expression in asked.iter().map(String::as_str).chain([alerts.as_str()]) {
        let names = names_in(expression);
        assert!(!names.is_empty(), "{expression}");
        for name in &names {
            assert!(there.contains(name), "{expression}: no {name} on the page");
        }
        used.extend(names);
    }

    // The page for people has them all, and no others.
    let document = fs::read_to_string(root().join("docs/monitoring.md")).unwrap();
    let without_suffix = |name: &str| {
        let name = ["_total", "_info", "_bucket", "_count", "_sum"]
            .iter()
            .find_map(|s| name.strip_suffix(s))
            .unwrap_or(name);
        name.to_owned()
    };
    let documented: BTreeSet<String> = names_in(&document).iter().map(|name| without_suffix(name)).collect();
    assert_eq!(documented, bases, "docs/monitoring.md, and the page");
    let unused: Vec<_> =
        there.iter().filter(|name| !used.iter().any(|u| without_suffix(u) == without_suffix(name))).collect();
    assert!(unused.len() < 8, "neither dashboard nor alerts show {unused:?}");
}
