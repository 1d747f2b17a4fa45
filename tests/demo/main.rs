//! `make demo`: usermilter behind both interfaces of a real Postfix, four SMTP dialogues, and what each left
//! in the log.
//!
//! Ends with 0 only if every mail went as it should. With `KEEP=1` in the environment the servers then run
//! on, to be tried by hand, until the demo is interrupted.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a demo that can't go on ends")]

#[path = "../common/mod.rs"]
mod common;

use std::process::ExitCode;
use std::time::Duration;

use common::smtp::{Client, Sent};
use common::{PATIENCE, Postfix, Site, sandbox, wait_until};

const CLIENT_ADDRESS: &str = "192.0.2.10";
const CLIENT_NAME: &str = "mx.sender.example";

const ALICE: &str = "alice@test.example";
const BOB: &str = "bob@test.example";
const LIST: &str = "list@test.example";

/// Alice's own executable: what it prints is what the sender's server gets to read.
const ALICE_FILTER: &str = "\
#!/bin/sh
if grep -q '^Subject:.*[Ii]nvoice'; then
    echo '5.7.1 Alice pays no invoices that come by mail'
    exit 77
fi
exit 0
";
const ALICE_REPLY: &str = "5.7.1 Alice pays no invoices that come by mail";

const BOB_FILTER: &str = "#!/bin/sh\nexit 0\n";

/// The list takes mail from its members only.
const LIST_RULES: &str = "\
default = \"reject\"

[[rule]]
sender-file = [\"members.txt\"]
action = \"accept\"
";
const MEMBER: &str = "member@sender.example";
const STRANGER: &str = "stranger@sender.example";

fn main() -> ExitCode {
    if !common::is_root() {
        eprintln!("demo: a private Postfix needs root: run this as root");
        return ExitCode::FAILURE;
    }
    let mut demo = Demo::start();
    demo.accepted();
    demo.refused_by_its_only_recipient();
    demo.recipients_disagree();
    demo.stranger_writes_to_the_list();
    demo.member_writes_to_the_list();
    demo.nothing_bounced();

    println!();
    if sandbox::kept() {
        demo.stay();
    }
    if demo.failures > 0 {
        println!("{} of the checks above failed.", demo.failures);
        return ExitCode::FAILURE;
    }
    println!("Every mail went as it should.");
    ExitCode::SUCCESS
}

struct Demo {
    postfix: Postfix,
    site: Site,
    dialogues: usize,
    failures: usize,
}

impl Demo {
    fn start() -> Self {
        let site = Site::of(&[("alice", 5001), ("bob", 5002), ("list", 5003)])
            .filter("alice", "message", ALICE_FILTER)
            .filter("bob", "message", BOB_FILTER);
        site.users.file("list", "rules.toml", LIST_RULES);
        site.users.file("list", "members.txt", format!("# who may write to the list\n{MEMBER}\n"));
        let site = site.start();
        let (milter, policy) = (site.milter_address(), site.policy_address());
        let postfix =
            Postfix::builder().mailboxes(&["alice", "bob", "list"]).milter(milter).policy(policy).start();
        println!("usermilter: milter {milter}, policy service {policy}");
        println!(
            "Postfix: 127.0.0.1:{}; XCLIENT makes it see {CLIENT_NAME}[{CLIENT_ADDRESS}]",
            postfix.port()
        );
        Demo { postfix, site, dialogues: 0, failures: 0 }
    }

    fn accepted(&mut self) {
        self.title("A mail that alice's filter accepts");
        let dialogue = self.send("friend@sender.example", &[ALICE], "Lunch");
        self.check("the server accepted the message", dialogue.code() == 250);
        self.check_delivered("alice", 1);
    }

    fn refused_by_its_only_recipient(&mut self) {
        self.title("A mail that its only recipient refuses, in the words of her filter");
        let dialogue = self.send("billing@sender.example", &[ALICE], "Invoice 4711");
        self.check("the server refused the message with 550", dialogue.code() == 550);
        self.check("the reply is what alice's filter printed", dialogue.sent.outcome().text() == ALICE_REPLY);
        self.check_delivered("alice", 1);
    }

    fn recipients_disagree(&mut self) {
        self.title("A mail that alice refuses and bob accepts: it is accepted, and both get it");
        let dialogue = self.send("billing@sender.example", &[ALICE, BOB], "Invoice 4712");
        self.check("the server accepted the message", dialogue.code() == 250);
        self.check_delivered("alice", 2);
        self.check_delivered("bob", 1);
    }

    fn stranger_writes_to_the_list(&mut self) {
        self.title("A mail from a stranger to a list: refused at RCPT TO by the policy service");
        let seen = self.site.daemon.log_lines().len();
        let sent = self.dialogue(STRANGER, LIST, "Buy this").sent;
        self.show_log(seen, LIST);
        let reply = &sent.recipients[0];
        self.check("the server refused the recipient with 550", reply.code == 550);
        self.check("it was the policy service", reply.text().contains("Recipient address rejected"));
        self.check("so the message was not sent", sent.data.is_none());
        self.check_delivered("list", 0);
    }

    fn member_writes_to_the_list(&mut self) {
        self.title("The same from a member of the list");
        let dialogue = self.send(MEMBER, &[LIST], "News");
        self.check("the server accepted the message", dialogue.code() == 250);
        self.check_delivered("list", 1);
    }

    /// Whoever was refused has been told in the session; a mail of ours about it would be backscatter.
    fn nothing_bounced(&mut self) {
        println!("\n=== Afterwards\n");
        let empty = wait_until(PATIENCE, || self.postfix.queue_is_empty());
        self.check("the queue is empty", empty);
        let bounced = self.postfix.log().contains("non-delivery notification");
        self.check("no bounce was written", !bounced);
    }

    fn title(&mut self, title: &str) {
        self.dialogues += 1;
        println!("\n=== {}. {title}\n", self.dialogues);
    }

    /// A dialogue whose message is sent, with the log lines about its queue id.
    fn send(&mut self, sender: &str, recipients: &[&str], subject: &str) -> Dialogue {
        let seen = self.site.daemon.log_lines().len();
        let dialogue = self.dialogue_with(sender, recipients, subject);
        if dialogue.sent.data.is_some() {
            let queue_id = self.queue_id(&dialogue.message_id);
            self.show_log(seen, &queue_id);
        }
        dialogue
    }

    fn dialogue(&mut self, sender: &str, recipient: &str, subject: &str) -> Dialogue {
        self.dialogue_with(sender, &[recipient], subject)
    }

    /// A session of one mail, printed; the preliminaries only the first time.
    fn dialogue_with(&mut self, sender: &str, recipients: &[&str], subject: &str) -> Dialogue {
        let message_id = format!("<demo-{}@sender.example>", self.dialogues);
        let message = format!(
            "From: {sender}\nTo: {}\nSubject: {subject}\nMessage-ID: {message_id}\n\nThis is demo mail number {}.\n",
            recipients.join(", "),
            self.dialogues
        );
        let mut client = Client::connect_as(self.postfix.port(), CLIENT_ADDRESS, CLIENT_NAME);
        let sent = client.send(sender, recipients, message.as_bytes());
        client.quit();
        let transcript = client.transcript();
        let start = if self.dialogues == 1 { 0 } else { transcript.find("C: MAIL").unwrap_or(0) };
        print!("{}", &transcript[start..]);
        Dialogue { sent, message_id }
    }

    /// What Postfix calls the message, from its log: a refused one has no queue id in the reply.
    fn queue_id(&self, message_id: &str) -> String {
        let line = self.postfix.wait_for_log(&format!("message-id={message_id}"));
        let (before, _) = line.split_once(": message-id=").unwrap();
        before.rsplit(' ').next().unwrap().to_owned()
    }

    /// Prints what usermilter has logged about this since, and checks that there is something.
    fn show_log(&mut self, seen: usize, about: &str) {
        let lines = || -> Vec<String> {
            let log = self.site.daemon.log_lines();
            log.into_iter().skip(seen).filter(|line| line.contains(about)).collect()
        };
        let logged = wait_until(Duration::from_secs(5), || !lines().is_empty());
        println!();
        for line in lines() {
            println!("log: {line}");
        }
        self.check(&format!("usermilter logged it under {about}"), logged);
    }

    fn check_delivered(&mut self, user: &str, count: usize) {
        let arrived = || self.postfix.maildir(user).len() == count;
        // What must not arrive has had its time once the queue is empty.
        let settled = wait_until(PATIENCE, || arrived() && self.postfix.queue_is_empty());
        let messages = if count == 1 { "message" } else { "messages" };
        self.check(&format!("{user} has {count} {messages}"), settled);
    }

    fn check(&mut self, what: &str, holds: bool) {
        if !holds {
            self.failures += 1;
        }
        println!("{} {what}", if holds { "ok:  " } else { "FAIL:" });
    }

    /// Leaves everything running until the process is interrupted; the servers end with it.
    fn stay(&self) -> ! {
        let port = self.postfix.port();
        println!("KEEP is set: this goes on running until Ctrl-C or SIGTERM to {}.", std::process::id());
        println!("  configuration  {}", self.site.daemon.config_path().display());
        println!("  users' homes   {}", self.site.users.homes().display());
        println!("  sandbox        {}", self.site.sandbox.path().display());
        println!(
            "  Postfix        {} (etc, maillog, mail/virtual/USER/new)",
            self.postfix.directory().display()
        );
        println!("Send a mail, as `swaks` does it and by hand:");
        println!(
            "  swaks --server 127.0.0.1:{port} --from you@sender.example --to {ALICE} --header 'Subject: Invoice'"
        );
        println!("  telnet 127.0.0.1 {port}");
        println!("The directories stay; remove them when done. What usermilter logs from now on:\n");
        let mut seen = self.site.daemon.log_lines().len();
        loop {
            for line in self.site.daemon.log_lines().iter().skip(seen) {
                println!("log: {line}");
                seen += 1;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

struct Dialogue {
    sent: Sent,
    message_id: String,
}

impl Dialogue {
    /// Of the reply to the message, or 0 if it was not sent.
    fn code(&self) -> u16 {
        self.sent.data.as_ref().map_or(0, |reply| reply.code)
    }
}
