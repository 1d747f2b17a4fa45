//! What an MTA would say of a mail, from the command line.

use std::{fmt, sync::Arc};

use super::Arguments;
use crate::{
    address::{Address, Sender},
    transaction::{Client, Envelope, Interface, RecipientArgument, Sasl},
};

/// `--set VARIABLE=VALUE`: what has no option of its own, by the name that filters know it by.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    variable: Settable,
    value: String,
}

/// Variables of a filter that come from the MTA and from nothing else that can be said on the command line.
#[derive(Clone, Copy, Debug)]
enum Settable {
    OriginalRecipient,
    ClientHostname,
    ClientProtocol,
    SaslUsername,
    SaslMethod,
    SaslSender,
    QueueId,
    Size,
    Smtputf8,
    Tls,
}

const SETTABLE: &[(&str, Settable)] = &[
    ("ORIGINAL_RECIPIENT", Settable::OriginalRecipient),
    ("CLIENT_HOSTNAME", Settable::ClientHostname),
    ("CLIENT_PROTOCOL", Settable::ClientProtocol),
    ("SASL_USERNAME", Settable::SaslUsername),
    ("SASL_METHOD", Settable::SaslMethod),
    ("SASL_SENDER", Settable::SaslSender),
    ("USERMILTER_QUEUE_ID", Settable::QueueId),
    ("USERMILTER_SIZE", Settable::Size),
    ("USERMILTER_SMTPUTF8", Settable::Smtputf8),
    ("USERMILTER_TLS", Settable::Tls),
];

impl std::str::FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("expected VARIABLE=VALUE")?;
        match SETTABLE.iter().find(|(known, _)| *known == name) {
            Some((_, Settable::Size)) if value.parse::<u64>().is_err() => {
                Err("expected a number of bytes".into())
            }
            Some((_, variable)) => Ok(Self { variable: *variable, value: value.into() }),
            None => {
                let names: Vec<&str> = SETTABLE.iter().map(|(name, _)| *name).collect();
                Err(format!("expected one of {}; for others there are options", names.join(", ")))
            }
        }
    }
}

/// One mail to one user, as far as it is known before the message.
pub(super) struct Mail {
    pub(super) envelope: Envelope,
    /// The (first) recipient, as the user's.
    pub(super) address: Address,
    /// As the client named it, before aliases: which of the user's addresses rules look at.
    pub(super) named: Address,
    /// The same, byte for byte.
    pub(super) argument: RecipientArgument,
    /// All recipients that mean the user.
    pub(super) all: Vec<String>,
}

impl Mail {
    /// What the arguments say; `default`: the recipient if they name none.
    ///
    /// # Errors
    ///
    /// Which option makes no sense, and why.
    pub(super) fn new(arguments: &Arguments, default: &str) -> Result<Self, String> {
        let mut recipients = Vec::new();
        for recipient in &arguments.recipients {
            recipients.push(read("--recipient", Address::parse(recipient.as_bytes()))?);
        }
        if recipients.is_empty() {
            recipients.push(read("--recipient", Address::parse(default.as_bytes()))?);
        }
        let mut client = Client {
            address: Some(arguments.client),
            helo: Some(arguments.helo.clone()),
            protocol: "ESMTP".into(),
            ..Client::default()
        };
        let mut named = recipients.clone();
        let (mut queue_id, mut declared_size, mut smtputf8) = (None, None, false);
        let mut raw = format!("<{}>", recipients[0]);
        for Setting { variable, value } in &arguments.settings {
            let value = value.clone();
            match variable {
                Settable::OriginalRecipient => {
                    named[0] = read("ORIGINAL_RECIPIENT", Address::parse(value.as_bytes()))?;
                    raw = format!("<{value}>");
                }
                Settable::ClientHostname => client.name = Some(value).filter(|name| name != "unknown"),
                Settable::ClientProtocol => client.protocol = value,
                Settable::SaslUsername => sasl(&mut client).username = value,
                Settable::SaslMethod => sasl(&mut client).method = value,
                Settable::SaslSender => sasl(&mut client).sender = value,
                Settable::QueueId => queue_id = Some(value).filter(|id| !id.is_empty()),
                Settable::Size => declared_size = value.parse().ok().filter(|size| *size > 0),
                Settable::Smtputf8 => smtputf8 = value == "1",
                Settable::Tls => client.tls = Some(value).filter(|tls| !tls.is_empty()),
            }
        }
        let envelope = Envelope {
            interface: Interface::Milter,
            queue_id,
            client: Arc::new(client),
            sender: read("--sender", Sender::parse(arguments.sender.as_bytes()))?,
            declared_size,
            smtputf8,
        };
        let argument = RecipientArgument { raw: raw.into_bytes(), mailer: None, mailbox: None };
        let all = named.iter().map(Address::to_string).collect();
        let (address, named) = (recipients.swap_remove(0), named.swap_remove(0));
        Ok(Self { envelope, address, named, argument, all })
    }
}

fn sasl(client: &mut Client) -> &mut Sasl {
    client.sasl.get_or_insert_default()
}

fn read<T>(option: &str, value: Result<T, impl fmt::Display>) -> Result<T, String> {
    value.map_err(|error| format!("{option}: {error}"))
}
