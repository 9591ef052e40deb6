//! What is done to nodes while they are under load.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clutch_client::Client;
use clutch_log::LogId;
use clutch_proto::admin::{TakeCheckpoint, TrimLog, admin_request::Op};
use rand::{Rng as _, rngs::StdRng};

use crate::{judge, trial::Trial};

/// A node is cut off, paused or deaf for so long, in seconds: within that somebody else must lead.
const LASTS_S: std::ops::Range<u64> = 3..9;
/// A follower is away for so long, in seconds, while its log is trimmed; and where it is far behind.
const BEHIND_S: u64 = 20;
const FAR_BEHIND_S: u64 = 300;
/// Packets in a hundred that are lost, and as many that come twice, on each host.
const LOST_PERCENT: u64 = 15;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The leader's process is ended by SIGKILL.
    Kill,
    /// The leader's process is told to end, as in a rolling restart, and started when it has.
    Restart,
    /// The leader's process is stopped by SIGSTOP, past the election, and goes on then.
    Pause,
    /// The leader and the other nodes hear nothing of each other; clients reach all.
    Cut,
    /// Nobody hears of the leader, nor it of anybody.
    Isolate,
    /// The leader hears nothing of the other nodes; they hear it.
    Deaf,
    /// The other nodes hear nothing of the leader; it hears them.
    Mute,
    /// Packets get lost, and come twice, everywhere.
    Loss,
    /// A byte of a file of a node that is down has another value.
    Flip,
    /// A follower is cut off while what it lacks is trimmed: it gets a snapshot.
    Behind,
    /// The same for five minutes.
    FarBehind,
    /// A new node is put in the place of the one that was there first in all logs, which are trimmed before: it gets snapshots. The
    /// other goes on to serve its disks.
    Replace,
}

impl Fault {
    /// Whether the network must be one that may be broken.
    pub(crate) fn needs_namespaces(self) -> bool {
        match self {
            Fault::Kill | Fault::Restart | Fault::Pause | Fault::Flip | Fault::Replace => false,
            Fault::Cut | Fault::Isolate | Fault::Deaf | Fault::Mute | Fault::Loss => true,
            Fault::Behind | Fault::FarBehind => true,
        }
    }
}

pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let status = Command::new(program).args(arguments).status().with_context(|| format!("run {program}"))?;
    ensure!(status.success(), "{program} {arguments:?}: {status}");
    Ok(())
}

impl Trial {
    /// Gives a node's host these rules instead of those before.
    fn filter(&self, node: u64, rules: &str) -> Result<()> {
        let prefix = self.namespaces.as_deref().context("no namespaces")?;
        let mut nft = Command::new("ip")
            .args(["netns", "exec", &format!("{prefix}{node}"), "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .context("run nft")?;
        let rules = format!("flush ruleset\n{rules}\n");
        std::io::Write::write_all(&mut nft.stdin.take().context("nft takes no rules")?, rules.as_bytes())?;
        ensure!(nft.wait()?.success(), "nft refuses {rules}");
        Ok(())
    }

    /// What the others' packets are thrown away by, on the way in, on the way out, or both.
    fn drop_rules(&self, whose: &[u64], hears: bool, is_heard: bool) -> String {
        let hosts: Vec<String> = whose.iter().map(|node| format!("10.98.0.{node}")).collect();
        let hosts = hosts.join(", ");
        let chain = |hook: &str, which: &str| {
            format!(
                "chain {hook} {{\n type filter hook {hook} priority 0;\n ip {which} {{ {hosts} }} drop\n}}\n"
            )
        };
        let mut rules = String::from("table inet trial {\n");
        if !hears {
            rules += &chain("input", "saddr");
        }
        if !is_heard {
            rules += &chain("output", "daddr");
        }
        rules + "}\n"
    }

    fn others(&self, node: u64) -> Vec<u64> {
        self.nodes().into_iter().filter(|other| *other != node).collect()
    }

    /// One round of a fault on who leads a log; how long it took until something of it was acknowledged again, where
    /// that is to be told.
    pub(crate) async fn strike(
        &self,
        fault: Fault,
        operator: &Client,
        log: LogId,
        random: &mut StdRng,
    ) -> Result<(u64, Option<Duration>)> {
        let leader = self.status(operator, log).await?.leader;
        let others = self.others(leader);
        let lasts = Duration::from_secs(random.random_range(LASTS_S));
        let outside: Vec<u64> = others.iter().copied().chain([254]).collect();
        match fault {
            Fault::Kill => run("kill", &["-9", &self.process(leader)?])?,
            Fault::Restart => run("kill", &["-TERM", &self.process(leader)?])?,
            Fault::Pause => run("kill", &["-STOP", &self.process(leader)?])?,
            Fault::Cut => self.filter(leader, &self.drop_rules(&others, false, false))?,
            Fault::Isolate => self.filter(leader, &self.drop_rules(&outside, false, false))?,
            Fault::Deaf => self.filter(leader, &self.drop_rules(&others, false, true))?,
            Fault::Mute => self.filter(leader, &self.drop_rules(&others, true, false))?,
            Fault::Loss => return self.loss(log, lasts).await.map(|()| (leader, None)),
            Fault::Flip => {
                let nodes = self.nodes();
                let node = nodes[random.random_range(0..nodes.len())];
                return self.flip(node, operator, random).await.map(|()| (node, None));
            }
            Fault::Replace => {
                let oldest = self.nodes()[0];
                return self.replace(oldest, operator).await.map(|()| (oldest, None));
            }
            Fault::Behind | Fault::FarBehind => {
                let for_s = if fault == Fault::Behind { BEHIND_S } else { FAR_BEHIND_S };
                let follower = others[random.random_range(0..others.len())];
                return self.leave_behind(follower, for_s, operator).await.map(|()| (follower, None));
            }
        }
        // Only what is asked from here on: a rule takes some milliseconds to be in force.
        let since = Instant::now();
        let took = self.next_acknowledged(log, since).await?;
        if !matches!(fault, Fault::Kill | Fault::Restart) {
            tokio::time::sleep(lasts.saturating_sub(since.elapsed())).await;
        }
        match fault {
            Fault::Kill | Fault::Restart => {
                self.ended(leader)?;
                self.script(&["start", &leader.to_string()])?;
            }
            Fault::Pause => run("kill", &["-CONT", &self.process(leader)?])?,
            _ => self.filter(leader, "")?,
        }
        Ok((leader, Some(took)))
    }

    async fn loss(&self, log: LogId, lasts: Duration) -> Result<()> {
        let rules = format!(
            "table inet trial {{\n chain input {{\n type filter hook input priority 0;\n numgen random mod 100 < {LOST_PERCENT} drop\n}}\n}}\n\
             table netdev trial {{\n chain egress {{\n type filter hook egress device eth0 priority 0;\n \
             numgen random mod 100 < {LOST_PERCENT} dup to eth0\n}}\n}}\n"
        );
        for node in self.nodes() {
            self.filter(node, &rules)?;
        }
        tokio::time::sleep(lasts).await;
        self.next_acknowledged(log, Instant::now()).await?;
        for node in self.nodes() {
            self.filter(node, "")?;
        }
        Ok(())
    }

    /// Cuts a node off that does not lead, and trims all logs to where it does not reach any more.
    async fn leave_behind(&self, follower: u64, for_s: u64, operator: &Client) -> Result<()> {
        self.filter(
            follower,
            &self.drop_rules(&[&self.others(follower)[..], &[254]].concat(), false, false),
        )?;
        tokio::time::sleep(Duration::from_secs(for_s)).await;
        self.trim(operator).await?;
        self.filter(follower, "")?;
        Ok(())
    }

    /// Trims all logs of what has been read of them.
    pub(crate) async fn trim(&self, operator: &Client) -> Result<()> {
        for log in self.logs() {
            judge::read_on(self, operator, log).await?;
            let upto = self.archive.lock().next(log) - 1;
            self.ask(operator, log, Op::TakeCheckpoint(TakeCheckpoint {})).await?;
            self.ask(operator, log, Op::TrimLog(TrimLog { upto })).await?;
        }
        Ok(())
    }
}

/// All faults, by the names that they are asked for with.
const ALL: [(&str, Fault); 12] = [
    ("kill", Fault::Kill),
    ("restart", Fault::Restart),
    ("pause", Fault::Pause),
    ("cut", Fault::Cut),
    ("isolate", Fault::Isolate),
    ("deaf", Fault::Deaf),
    ("mute", Fault::Mute),
    ("loss", Fault::Loss),
    ("flip", Fault::Flip),
    ("behind", Fault::Behind),
    ("far-behind", Fault::FarBehind),
    ("replace", Fault::Replace),
];

/// The faults that a list with commas names.
pub(crate) fn of_names(names: &str) -> Result<Vec<Fault>> {
    let of_name = |name: &str| match ALL.iter().find(|(known, _)| *known == name) {
        Some((_, fault)) => Ok(*fault),
        None => bail!("{name:?} is no fault; there are {}", ALL.map(|(known, _)| known).join(", ")),
    };
    names.split(',').map(of_name).collect()
}
