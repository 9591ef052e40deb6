//! Transcripts of a machine: entries in, answers, actions and rows out, as text. They are read as diffs: what a change does to
//! answers and rows shows in `testdata`, and whoever means it writes them anew with `UPDATE_TRANSCRIPTS=1`. For tests only.
//!
//! `>` is an entry or `?` a read, `<` its answer, `!` what the leader's shell is to do, `=` the answer of a request that waited,
//! `+` a row as it is afterwards, `-` one that is gone. Fields that have their defaults are left out.

use std::{
    collections::BTreeMap,
    fmt::{Debug, Write as _},
    ops::RangeInclusive,
    path::Path,
    sync::Arc,
};

use bytes::Bytes;
use clutch_proto::{
    Refusal,
    log::{Batch, Epoch},
    state::{Entry, entry::Kind},
};
use clutch_state::{Applier, EntryOutcome, Machine, MemoryStore, Stop, Table, View as _};
use prost::Message;

type Rows = BTreeMap<(u8, Bytes), (&'static str, String)>;

/// How a machine's rows and answers are shown.
pub struct Shows<M: Machine> {
    /// Its tables.
    pub tables: RangeInclusive<u8>,
    /// The name of a table, and a row of it in words.
    pub row: fn(Table, &[u8]) -> (&'static str, String),
    /// An answer in words.
    pub reply: fn(&M::Reply) -> String,
}

/// A machine and what it has done so far.
pub struct Transcript<M: Machine> {
    /// What has been said.
    pub text: String,
    /// The stamp of the next entries.
    pub stamp: u64,
    /// What the leader's shell is to do after the last entry.
    pub actions: Vec<M::Effect>,
    store: Arc<MemoryStore>,
    applier: Applier<M>,
    shows: Shows<M>,
    rows: Rows,
}

impl<M: Machine> Transcript<M>
where
    M::Effect: Debug,
{
    /// An empty state.
    pub fn new(shows: Shows<M>) -> Transcript<M> {
        let store = Arc::new(MemoryStore::new());
        let applier = Applier::open(store.clone()).expect("an empty store opens");
        Transcript {
            text: String::new(),
            stamp: 1,
            actions: Vec::new(),
            store,
            applier,
            shows,
            rows: Rows::new(),
        }
    }

    /// Says what comes.
    pub fn title(&mut self, words: &str) {
        self.say(&format!("\n# {words}\n"));
    }

    /// Applies an entry; its answer, or `None` when it waits.
    pub fn entry(&mut self, words: &str, entry: &M::Entry) -> Option<Result<M::Reply, Refusal>> {
        let body = Kind::Body(entry.encode_to_vec().into());
        let entry = Entry { stamp: self.stamp, kind: Some(body) }.encode_to_vec().into();
        let position = self.applier.position().next();
        let batch = Batch { position, epoch: Epoch(1), entries: vec![entry] };
        let mut applied = self.applier.apply(&batch).expect("no fault");
        self.say(&format!("> {words}"));
        let answer = match applied.outcomes.remove(0).1 {
            EntryOutcome::Done(answer) => {
                self.answer("  <", &answer);
                Some(answer)
            }
            EntryOutcome::Pending => {
                self.say("  < later");
                None
            }
            EntryOutcome::Internal => None,
        };
        for action in &applied.actions {
            self.say(&format!("  ! {}", short(action)));
        }
        for (tag, answer) in &applied.resolved {
            self.answer(&format!("  = {}.{}:", tag.client, tag.sequence), answer);
        }
        self.actions = applied.actions;
        self.compare_rows();
        answer
    }

    /// Reads.
    pub fn read(&mut self, words: &str, request: &M::Request, facts: &M::Facts) -> Option<M::Reply> {
        self.say(&format!("? {words}"));
        let answer = M::read(&*self.store, request, facts).map_err(|stop| match stop {
            Stop::Refused(refusal) => refusal,
            other => panic!("{other}"),
        });
        self.answer("  <", &answer);
        answer.ok()
    }

    fn say(&mut self, words: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{words}");
    }

    fn answer(&mut self, sign: &str, answer: &Result<M::Reply, Refusal>) {
        match answer {
            Ok(reply) => self.say(&format!("{sign} {}", (self.shows.reply)(reply))),
            Err(refusal) => self.say(&format!("{sign} refused: {:?}", refusal.code)),
        }
    }

    fn compare_rows(&mut self) {
        let mut after = Rows::new();
        for table in self.shows.tables.clone() {
            for (key, value) in self.store.scan(Table(table), &[], &[], usize::MAX).expect("reads") {
                after.insert((table, key), (self.shows.row)(Table(table), &value));
            }
        }
        let hex = |key: &Bytes| key.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let before = std::mem::replace(&mut self.rows, after.clone());
        for (at, (table, value)) in &after {
            if before.get(at).is_none_or(|row| row.1 != *value) {
                self.say(&format!("  + {table} {} {value}", hex(&at.1)));
            }
        }
        for (at, (table, _)) in before.iter().filter(|(at, _)| !after.contains_key(*at)) {
            self.say(&format!("  - {table} {}", hex(&at.1)));
        }
    }
}

/// Debug output without what has its default.
pub fn short(value: &impl Debug) -> String {
    let mut text = format!("{value:?}");
    for end in [", ", " }"] {
        for default in ["0", "false", "None", "[]", "\"\"", "b\"\""] {
            let pattern = format!(": {default}{end}");
            while let Some(at) = text.find(&pattern) {
                let name = text[..at].rfind([' ', '{']).map_or(0, |before| before + 1);
                let keep = if end == " }" { "}" } else { "" };
                text.replace_range(name..at + pattern.len(), keep);
            }
        }
    }
    text.replace(", }", " }").replace("{ }", "{}").replace("  ", " ")
}

/// A row that is a message.
pub fn shown<R: Message + Default + Debug>(value: &[u8]) -> String {
    short(&R::decode(value).expect("a row"))
}

/// Compares a transcript with its kept text, or writes it anew when `UPDATE_TRANSCRIPTS` is set.
#[expect(clippy::disallowed_methods, reason = "transcripts are files, and no part of a machine")]
pub fn compare(kept: &Path, text: &str) {
    if std::env::var_os("UPDATE_TRANSCRIPTS").is_some() {
        std::fs::write(kept, text).expect("writes");
    }
    let name = kept.display();
    let kept = std::fs::read_to_string(kept).expect("a kept transcript; UPDATE_TRANSCRIPTS=1 writes it");
    for (number, (kept, now)) in kept.lines().zip(text.lines()).enumerate() {
        assert_eq!(kept, now, "line {} of {name}", number + 1);
    }
    assert_eq!(kept.lines().count(), text.lines().count(), "lines of {name}");
}
