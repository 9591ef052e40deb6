//! Remote paths as they stand on the command line: absolute, of any bytes.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
};

use clap::builder::{TypedValueParser, ValueParserFactory};

use crate::output;

/// An absolute path of any bytes but NUL. Shown without control characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RemotePath(Vec<u8>);

impl RemotePath {
    /// A path below another.
    pub(crate) fn join(&self, name: &[u8]) -> RemotePath {
        let mut path = self.trimmed().0;
        path.push(b'/');
        path.extend_from_slice(name);
        RemotePath(path)
    }

    /// Without slashes at the end; the root is empty.
    pub(crate) fn trimmed(&self) -> RemotePath {
        let end = self.0.iter().rposition(|b| *b != b'/').map_or(0, |last| last + 1);
        RemotePath(self.0[..end].to_vec())
    }

    /// Whether it says by its end that it means a directory.
    pub(crate) fn means_directory(&self) -> bool {
        clutch_client::means_directory(&self.0)
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<&str> for RemotePath {
    fn from(path: &str) -> RemotePath {
        RemotePath(path.as_bytes().to_vec())
    }
}

impl AsRef<[u8]> for RemotePath {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for RemotePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&output::printable(&self.0))
    }
}

/// Reads a remote path.
#[derive(Clone)]
pub(crate) struct RemotePathParser;

impl TypedValueParser for RemotePathParser {
    type Value = RemotePath;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<RemotePath, clap::Error> {
        let bytes = OsString::into_vec(value.to_owned());
        if bytes.first() == Some(&b'/') {
            return Ok(RemotePath(bytes));
        }
        let mut error = clap::Error::new(clap::error::ErrorKind::ValueValidation).with_cmd(command);
        if let Some(argument) = argument {
            let name = clap::error::ContextValue::String(argument.to_string());
            error.insert(clap::error::ContextKind::InvalidArg, name);
        }
        let shown =
            format!("{}: remote paths are absolute: begin with /", output::printable(value.as_bytes()));
        error.insert(clap::error::ContextKind::InvalidValue, clap::error::ContextValue::String(shown));
        Err(error)
    }
}

impl ValueParserFactory for RemotePath {
    type Parser = RemotePathParser;

    fn value_parser() -> RemotePathParser {
        RemotePathParser
    }
}
