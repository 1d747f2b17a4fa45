//! Whose processor time it was: of the servers that are measured, or of what asks them.

use std::collections::{BTreeMap, HashMap};

/// A process with all its children.
#[derive(Clone, Copy)]
pub(crate) struct Server {
    pub(crate) pid: u32,
    /// What it is called in tables; its children have their own names.
    pub(crate) name: &'static str,
}

/// Who is measured. The others are clients.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Measuring {
    /// The servers.
    Servers,
    /// Children of this process that have ended meanwhile.
    Children,
    /// This process, which asks the servers.
    ThisProcess,
}

/// Processor time, in seconds.
#[derive(Clone, Default)]
pub(crate) struct Spent {
    /// Of who is measured.
    pub(crate) server: f64,
    /// Of everybody else who had to do with it.
    pub(crate) client: f64,
    /// Both, by name.
    pub(crate) processes: BTreeMap<String, f64>,
}

/// What is called so is in [`Spent::client`].
const CLIENT: &str = "client";

impl Spent {
    pub(crate) fn total(&self) -> f64 {
        self.server + self.client
    }

    /// Of one of so many.
    pub(crate) fn each(mut self, count: f64) -> Self {
        let all = self.processes.values_mut().chain([&mut self.server, &mut self.client]);
        all.for_each(|seconds| *seconds /= count);
        self
    }

    /// Of both.
    pub(crate) fn and(mut self, other: &Self) -> Self {
        self.server += other.server;
        self.client += other.client;
        for (name, seconds) in &other.processes {
            *self.processes.entry(name.clone()).or_default() += seconds;
        }
        self
    }
}

/// Looks at processes from the first look to the last. The more looks between, the fewer processes end unseen.
pub(crate) struct Watch {
    measuring: Measuring,
    servers: Vec<Tree>,
    /// Of this process.
    before: Times,
}

struct Tree {
    server: Server,
    before: f64,
    /// By pid.
    seen: HashMap<u32, Seen>,
}

struct Seen {
    name: String,
    first: f64,
    last: f64,
}

impl Watch {
    pub(crate) fn start(measuring: Measuring, servers: &[Server]) -> Self {
        let trees = servers.iter().map(|&server| {
            let mut tree = Tree { server, before: 0.0, seen: HashMap::new() };
            tree.before = tree.look(true);
            tree
        });
        Self { measuring, servers: trees.collect(), before: of_process(std::process::id()) }
    }

    pub(crate) fn look(&mut self) {
        for tree in &mut self.servers {
            tree.look(false);
        }
    }

    pub(crate) fn end(self) -> Spent {
        let mut spent = Spent::default();
        let now = of_process(std::process::id());
        let (own, children) = (now.own - self.before.own, now.children - self.before.children);
        let mut add = |name: &str, seconds: f64, is_server: bool| {
            *if is_server { &mut spent.server } else { &mut spent.client } += seconds;
            *spent.processes.entry(name.to_owned()).or_default() += seconds;
        };
        let (of_children, ours) = match self.measuring {
            Measuring::Servers => (CLIENT, CLIENT),
            Measuring::Children => ("loop, and what it runs", CLIENT),
            Measuring::ThisProcess => (CLIENT, "who asks"),
        };
        add(of_children, children, self.measuring == Measuring::Children);
        add(ours, own, self.measuring == Measuring::ThisProcess);
        for mut tree in self.servers {
            let mut rest = tree.look(false) - tree.before;
            let is_server = self.measuring == Measuring::Servers;
            for seen in tree.seen.values() {
                add(&seen.name, seen.last - seen.first, is_server);
                rest -= seen.last - seen.first;
            }
            add(tree.server.ended_children(), rest, is_server);
        }
        spent
    }
}

impl Server {
    pub(crate) fn usermilter(pid: u32) -> Self {
        Self { pid, name: "monitor" }
    }

    /// What children are called that end before anybody sees them.
    fn ended_children(self) -> &'static str {
        match self.name {
            "monitor" => "filters, from fork to end",
            "loop" => "loop's children",
            _ => "ended unseen",
        }
    }
}

impl Tree {
    /// The time of all of them, those included that have ended.
    fn look(&mut self, is_first: bool) -> f64 {
        self.look_at(self.server.pid, self.server.name, is_first)
    }

    fn look_at(&mut self, pid: u32, name: &str, is_first: bool) -> f64 {
        let process = of_process(pid);
        // Of threads that have ended there are ticks only.
        let own = if process.threads == 1.0 { of_thread(pid).unwrap_or(process.own) } else { process.own };
        // One that is new has done all that it has done since the first look.
        let first = if is_first { own } else { 0.0 };
        let seen = self.seen.entry(pid).or_insert_with(|| Seen { name: name.to_owned(), first, last: first });
        // A child that is gone by now has no time.
        seen.last = seen.last.max(own);
        let children =
            std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children = children.split_whitespace().filter_map(|child| child.parse().ok());
        // One that ends meanwhile is counted for its parent from then on.
        let of_children: f64 = children
            .map(|child| {
                let name = name_of(child);
                self.look_at(child, if name == "usermilter" { "worker" } else { &name }, is_first)
            })
            .sum();
        own + process.children + of_children
    }
}

/// Processor time of a process, in seconds.
#[derive(Default)]
struct Times {
    own: f64,
    /// Of children that have ended.
    children: f64,
    threads: f64,
}

/// utime, stime, cutime and cstime of proc_pid_stat(5).
fn of_process(pid: u32) -> Times {
    /// USER_HZ is 100 on every architecture that Rust knows.
    const TICKS_PER_SECOND: f64 = 100.0;
    // A child may be gone by now.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
    let numbers: Vec<f64> = fields.skip(11).take(7).filter_map(|field| field.parse().ok()).collect();
    let [user, system, children_user, children_system, _, _, threads] = numbers[..] else {
        return Times::default();
    };
    Times {
        own: (user + system) / TICKS_PER_SECOND,
        children: (children_user + children_system) / TICKS_PER_SECOND,
        threads,
    }
}

/// Of the first thread of a process, in more than ticks: one of Postfix's that serves a hundred sessions has few.
fn of_thread(pid: u32) -> Option<f64> {
    let statistics = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
    Some(statistics.split(' ').next()?.parse::<f64>().ok()? / 1e9)
}

fn name_of(pid: u32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim_end().to_owned()
}
