//! What a filter finds in its environment: the names of Postfix local(8) and pipe(8), and USERMILTER_ ones.

use tracing::warn;

use crate::{
    address::Address,
    monitor::{Phase, Variable},
    transaction::{Envelope, RecipientArgument},
};

/// Longest value, in bytes; execve(2) takes 128 KiB, and a request to the monitor not much more in all.
const MAX_VALUE_LENGTH: usize = 64 * 1024;

/// Of whom the filter is asked.
pub struct Subject<'a> {
    /// The final address of the (first) recipient.
    pub address: &'a Address,
    /// Its extension.
    pub extension: Option<&'a str>,
    /// How the client named it.
    pub argument: &'a RecipientArgument,
    /// All recipients that mean this user and this filter.
    pub all: Vec<String>,
}

/// The variables of one filter. A value that NUL, CR or LF makes unusable is dropped, and logged; all others are set,
/// be they empty.
pub fn variables(
    envelope: &Envelope,
    phase: Phase,
    size: Option<u64>,
    subject: &Subject<'_>,
) -> Vec<(Variable, String)> {
    let client = &*envelope.client;
    let sasl = client.sasl.clone().unwrap_or_default();
    let unknown = || "unknown".to_owned();
    let raw = String::from_utf8_lossy(&subject.argument.raw);
    let original = raw.trim_start_matches('<').trim_end_matches('>').to_owned();
    let extension = subject.extension.unwrap_or_default();
    let local = subject.address.local();
    let mut variables = vec![
        (Variable::Sender, envelope.sender.to_string()),
        (Variable::Recipient, subject.address.to_string()),
        (Variable::OriginalRecipient, original),
        (Variable::Local, local.to_owned()),
        (Variable::Extension, extension.to_owned()),
        (Variable::Domain, subject.address.domain().unwrap_or_default().to_owned()),
        (Variable::ClientAddress, client.address.map_or_else(unknown, |a| a.to_string())),
        (Variable::ClientHostname, client.name.clone().unwrap_or_else(unknown)),
        (Variable::ClientHelo, client.helo.clone().unwrap_or_default()),
        (Variable::ClientProtocol, client.protocol.clone()),
        (Variable::SaslUsername, sasl.username),
        (Variable::SaslMethod, sasl.method),
        (Variable::SaslSender, sasl.sender),
        (Variable::Phase, phase.as_str().to_owned()),
        (Variable::QueueId, envelope.queue_id.clone().unwrap_or_default()),
        (Variable::Size, size.unwrap_or(0).to_string()),
        (Variable::Smtputf8, if envelope.smtputf8 { "1" } else { "0" }.to_owned()),
        (Variable::Tls, client.tls.clone().unwrap_or_default()),
        (Variable::Version, env!("CARGO_PKG_VERSION").to_owned()),
    ];
    variables.retain(|(variable, value)| {
        let usable = !value.contains(['\0', '\r', '\n']) && value.len() <= MAX_VALUE_LENGTH;
        if !usable {
            let (id, name) = (envelope.queue_id(), variable.name());
            warn!("{id}: {name} dropped: it has a NUL or a line end, or is too long");
        }
        usable
    });
    variables.push((Variable::Recipients, recipients(envelope, &subject.all)));
    variables
}

/// One address a line, as many as have room.
fn recipients(envelope: &Envelope, all: &[String]) -> String {
    let mut list = String::new();
    for address in all.iter().filter(|address| !address.contains(['\0', '\r', '\n'])) {
        if list.len() + address.len() > MAX_VALUE_LENGTH {
            warn!(
                "{}: not all of {} recipients have room in the environment",
                envelope.queue_id(),
                all.len()
            );
            break;
        }
        if !list.is_empty() {
            list.push('\n');
        }
        list.push_str(address);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        address::Sender,
        transaction::{Client, Interface},
    };
    use std::sync::Arc;

    fn value(variables: &[(Variable, String)], name: &str) -> String {
        variables.iter().find(|(v, _)| v.name() == name).unwrap().1.clone()
    }

    #[test]
    fn values_of_strangers_can_not_add_lines() {
        let client = Client { helo: Some("a\nPATH=/evil".into()), ..Client::default() };
        let envelope = Envelope {
            interface: Interface::Milter,
            queue_id: None,
            client: Arc::new(client),
            sender: Sender::Null,
            declared_size: None,
            smtputf8: false,
        };
        let address = Address::parse(b"alice+shop@example.org").unwrap();
        let argument = RecipientArgument { raw: b"<Alice+shop@example.org>".to_vec(), ..Default::default() };
        let all = vec!["alice+shop@example.org".into(), "x\ny@example.org".into(), "al@example.org".into()];
        let subject = Subject { address: &address, extension: Some("shop"), argument: &argument, all };
        let variables = variables(&envelope, Phase::Message, Some(5), &subject);
        assert!(!variables.iter().any(|(variable, _)| *variable == Variable::ClientHelo));
        assert_eq!(value(&variables, "SENDER"), "");
        assert_eq!(value(&variables, "LOCAL"), "alice+shop");
        assert_eq!(value(&variables, "EXTENSION"), "shop");
        assert_eq!(value(&variables, "ORIGINAL_RECIPIENT"), "Alice+shop@example.org");
        assert_eq!(value(&variables, "CLIENT_ADDRESS"), "unknown");
        assert_eq!(value(&variables, "USERMILTER_RECIPIENTS"), "alice+shop@example.org\nal@example.org");
    }
}
