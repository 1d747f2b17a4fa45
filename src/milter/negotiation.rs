//! What is asked of the MTA: only stages, options and macros that are needed, and only what it offers.

use std::{collections::HashMap, ffi::CString};

use indymilter::{Actions, MacroStage, ProtoOpts};

/// Macros asked for at the stages where they are read.
///
/// The client is asked for at MAIL, not at CONNECT: the address of a CONNECT command may be a word like `unknown`,
/// which indymilter takes for a broken protocol. Stages that are not listed keep the MTA's own list, so the others
/// get a short one.
const MACROS: [(MacroStage, &std::ffi::CStr); 7] = [
    (MacroStage::Connect, c"j"),
    (MacroStage::Helo, c"j"),
    (
        MacroStage::Mail,
        c"i j {client_addr} {client_name} {client_port} {auth_type} {auth_authen} {auth_author} {tls_version}",
    ),
    (MacroStage::Rcpt, c"i {rcpt_mailer} {rcpt_addr}"),
    (MacroStage::Data, c"i"),
    (MacroStage::Eoh, c"i"),
    (MacroStage::Eom, c"i"),
];

/// The outcome of a negotiation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Terms {
    pub(super) actions: Actions,
    pub(super) options: ProtoOpts,
    pub(super) macros: HashMap<MacroStage, CString>,
}

/// What redirecting and dropping refusers' copies takes.
pub(super) const CHANGE_RECIPIENTS: Actions = Actions::ADD_RCPT.union(Actions::DELETE_RCPT);

/// What to take of what an MTA offers.
pub(super) fn terms(actions: Actions, options: ProtoOpts, wants_changes: bool) -> Terms {
    let lists_macros = actions.contains(Actions::REQUEST_MACROS);
    let mut wanted = ProtoOpts::NO_UNKNOWN
        | ProtoOpts::NOREPLY_CONNECT
        | ProtoOpts::NOREPLY_HELO
        | ProtoOpts::NOREPLY_MAIL
        | ProtoOpts::NOREPLY_HEADER
        | ProtoOpts::NOREPLY_EOH
        | ProtoOpts::LEADING_SPACE
        | ProtoOpts::SKIP;
    if lists_macros {
        // The macros say more, and better.
        wanted |= ProtoOpts::NO_CONNECT;
    }
    let macros = if lists_macros {
        MACROS.iter().map(|(stage, list)| (*stage, CString::from(*list))).collect()
    } else {
        HashMap::new()
    };
    let mut wanted_actions = Actions::REQUEST_MACROS;
    // One without the other would lose mail or deliver it twice.
    if wants_changes && actions.contains(CHANGE_RECIPIENTS) {
        wanted_actions |= CHANGE_RECIPIENTS;
    }
    Terms { actions: actions & wanted_actions, options: options & wanted, macros }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_requested_that_is_not_offered() {
        let none = terms(Actions::empty(), ProtoOpts::empty(), true);
        assert_eq!((none.actions, none.options), (Actions::empty(), ProtoOpts::empty()));
        assert!(none.macros.is_empty());
        let old = terms(Actions::ADD_RCPT, ProtoOpts::NO_CONNECT | ProtoOpts::NO_HELO, true);
        assert!(old.actions.is_empty(), "adding recipients without deleting any would deliver twice");
        assert!(old.options.is_empty(), "without macro lists the client is known from CONNECT only");
    }

    #[test]
    fn stages_that_need_no_answer_get_none() {
        let all = terms(Actions::all(), ProtoOpts::all(), false);
        for quiet in [
            ProtoOpts::NOREPLY_HELO,
            ProtoOpts::NOREPLY_MAIL,
            ProtoOpts::NOREPLY_HEADER,
            ProtoOpts::NOREPLY_EOH,
        ] {
            assert!(all.options.contains(quiet));
        }
        assert_eq!(all.actions, Actions::REQUEST_MACROS);
        for answered in [ProtoOpts::NOREPLY_RCPT, ProtoOpts::NOREPLY_DATA, ProtoOpts::NOREPLY_BODY] {
            assert!(!all.options.contains(answered));
        }
    }
}
