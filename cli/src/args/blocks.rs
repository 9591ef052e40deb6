//! What `clutch blocks` is told.

use clap::{Args, Subcommand};

#[derive(Subcommand, Debug)]
pub(crate) enum BlocksCommand {
    /// All block services with what they hold, and how many spans have all of their blocks.
    Status {
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Empty a disk: it takes no new blocks, and what it holds is moved to others, computed from the others where it cannot be
    /// read. May be ended at any time and told again.
    Drain {
        /// The service, as `clutch blocks status` names it.
        #[arg(value_parser = parse_service)]
        service: u64,
        /// Let the disk take blocks again instead.
        #[arg(long)]
        cancel: bool,
        #[command(flatten)]
        pace: Pace,
    },
    /// Move what is on disks that are gone or are to be emptied, spans that lack most first, until nothing is left there.
    Repair {
        #[command(flatten)]
        pace: Pace,
    },
    /// Let every service read all of its blocks and compare them with what was written; what is missing or damaged is computed from
    /// the others, written elsewhere, and all of it is read again.
    Scrub {
        /// Begin at once.
        #[arg(long, required = true)]
        now: bool,
        /// End when it has ended.
        #[arg(long, required = true)]
        wait: bool,
        #[command(flatten)]
        pace: Pace,
    },
    /// Forget a disk for good, once nothing that is in use is on it.
    Remove {
        /// The service, as `clutch blocks status` names it.
        #[arg(value_parser = parse_service)]
        service: u64,
    },
}

#[derive(Args, Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// Bytes of blocks that are written in a second at most; 0 for no limit.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) bytes_per_s: u64,
    /// Spans that are checked or repaired at a time.
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) at_a_time: u16,
    /// Print one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

impl BlocksCommand {
    pub(crate) fn wants_json(&self) -> bool {
        match self {
            BlocksCommand::Status { json } => *json,
            BlocksCommand::Drain { pace, .. }
            | BlocksCommand::Repair { pace }
            | BlocksCommand::Scrub { pace, .. } => pace.json,
            BlocksCommand::Remove { .. } => false,
        }
    }
}

fn parse_service(text: &str) -> Result<u64, String> {
    let is_hex = (1..=16).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    let number = u64::from_str_radix(text, 16).ok().filter(|service| is_hex && *service != 0);
    number.ok_or_else(|| {
        "a service is named by up to 16 hexadecimal digits, as `clutch blocks status` prints them".into()
    })
}
