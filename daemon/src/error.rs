//! The kinds of failure that a caller of the CRI can act on, and the one mapping to gRPC codes.
//!
//! Every public error of the daemon has a `kind()`. What is sent is the whole chain on one line:
//! the kubelet shows it to users as it is.

use std::{error::Error as StdError, io};

/// What a caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request is wrong and will stay wrong.
    Invalid,
    /// The object does not exist.
    NotFound,
    /// An object of that name exists and is a different one.
    AlreadyExists,
    /// The object, or this node, is not in a state that allows it.
    Precondition,
    /// The other side (registry) refused our credentials, or has none of ours.
    Denied,
    /// A limit is reached: disk, outstanding sessions, size.
    Exhausted,
    /// The deadline of an outside call passed.
    Deadline,
    /// Something outside does not answer just now; a retry may help.
    Unavailable,
    /// This node cannot do that at all.
    Unsupported,
    /// A fault of ours, or of something we called.
    Internal,
}

impl Kind {
    /// That of an error of the file system: there is no room, or something is wrong.
    pub fn of_disk(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::Exhausted,
            _ => Kind::Internal,
        }
    }

    /// The gRPC code of this kind.
    pub fn code(self) -> tonic::Code {
        match self {
            Kind::Invalid => tonic::Code::InvalidArgument,
            Kind::NotFound => tonic::Code::NotFound,
            Kind::AlreadyExists => tonic::Code::AlreadyExists,
            Kind::Precondition => tonic::Code::FailedPrecondition,
            Kind::Denied => tonic::Code::PermissionDenied,
            Kind::Exhausted => tonic::Code::ResourceExhausted,
            Kind::Deadline => tonic::Code::DeadlineExceeded,
            Kind::Unavailable => tonic::Code::Unavailable,
            Kind::Unsupported => tonic::Code::Unimplemented,
            Kind::Internal => tonic::Code::Internal,
        }
    }
}

/// An error that knows its kind.
pub trait Kinded: StdError {
    /// What a caller can do about it.
    fn kind(&self) -> Kind;
}

/// The whole chain of an error on one line: `outer: inner: innermost`.
pub fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text.replace('\n', " ")
}

/// The gRPC status of an error.
pub fn status(error: &(impl Kinded + 'static)) -> tonic::Status {
    tonic::Status::new(error.kind().code(), chain(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("open layer abc")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_chain_is_one_line_with_every_cause() {
        let error = Outer(std::io::Error::other("disk\non fire"));
        assert_eq!(chain(&error), "open layer abc: disk on fire");
    }
}
