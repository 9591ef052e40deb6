//! Disks that hang for a while, reads and all: work that needs nothing of one goes on as fast as before, in the world's own
//! time; and where all hang, as what they share may, none is taken for a disk without room.

use std::time::Duration;

use bytes::Bytes;
use clutch_client::{Client, ClientError};
use clutch_proto::InodeId;

use crate::{
    sim_cluster::{CLIENT, ClusterConfig, SimCluster, disk_node},
    workload::attributes,
};

const FILES: u64 = 60;
const FILE_BYTES: u64 = 40_000;
const DISKS: u32 = 8;
/// Longer than all of a run.
const FOR_GOOD: Duration = Duration::from_secs(100_000);

/// A read that meets a disk which does not answer goes on with others before this.
const LONGEST_READ: Duration = Duration::from_millis(500);

/// What the kinds of work took that are compared.
const KINDS: [&str; 3] = ["looking up", "reading", "writing"];

fn cluster() -> Result<SimCluster, String> {
    let config = ClusterConfig::of(2, DISKS, (2, 2));
    SimCluster::start_with(5, config).ok_or_else(|| "the cluster does not come up".into())
}

fn name(kind: &str, number: u64) -> Bytes {
    format!("{kind}{number}").into()
}

async fn write(client: &Client, name: &Bytes) -> Result<(), ClientError> {
    let bytes = vec![7u8; FILE_BYTES as usize];
    client.write_file(InodeId::ROOT, name, attributes(), true, &mut &bytes[..]).await.map(drop)
}

async fn read(client: &Client, name: &Bytes) -> Result<(), ClientError> {
    let found = client.lookup(InodeId::ROOT, name).await?;
    let id = InodeId::from_wire(found.target).expect("the id of a file that was written");
    let length = client.read_file(id, &mut |_| Ok(())).await?;
    assert_eq!(length, FILE_BYTES, "what was written is read");
    Ok(())
}

fn run<T: Send + 'static>(
    cluster: &SimCluster,
    part: impl Future<Output = Result<T, ClientError>> + Send + 'static,
) -> Result<T, String> {
    let ended = cluster.world.run(CLIENT, FOR_GOOD, part);
    ended.ok_or("it does not come to an end")?.map_err(|e| e.to_string())
}

/// A cluster with files, and who has written them.
fn with_files() -> Result<(SimCluster, Client), String> {
    let cluster = cluster()?;
    let client = cluster.client();
    let c = client.clone();
    run(&cluster, async move {
        for number in 0..FILES {
            write(&c, &name("before", number)).await?;
        }
        Ok(())
    })?;
    Ok((cluster, client))
}

/// How long it took to find out that a disk hangs (if one does), and from then on each kind of work.
fn took(hangs: bool) -> Result<(Duration, [Duration; 3]), String> {
    let (cluster, client) = with_files()?;
    if hangs {
        cluster.world.disk(disk_node(0)).hang_after(0, FOR_GOOD);
    }
    run(&cluster, async move {
        let clock = client.runtime().clock.clone();
        let begin = clock.monotonic();
        for number in 0..FILES / 4 {
            write(&client, &name("learning", number)).await?;
            read(&client, &name("before", number)).await?;
        }
        let (learning, mut took) = (clock.monotonic() - begin, [Duration::ZERO; 3]);
        for number in 0..FILES {
            let begin = clock.monotonic();
            client.lookup(InodeId::ROOT, &name("before", number)).await?;
            let looked_up = clock.monotonic();
            read(&client, &name("before", number)).await?;
            let have_read = clock.monotonic();
            write(&client, &name("after", number)).await?;
            took[0] += looked_up - begin;
            took[1] += have_read - looked_up;
            took[2] += clock.monotonic() - have_read;
        }
        Ok((learning, took))
    })
}

/// Which part of its rate without it each kind of work has beside a disk that hangs.
///
/// # Errors
/// What failed; also when nobody met the disk.
pub fn rates() -> Result<[(&'static str, f64); 3], String> {
    let (met_nothing, before) = took(false)?;
    let (learning, beside) = took(true)?;
    if learning < met_nothing * 3 {
        return Err(format!(
            "nobody met the disk that hangs: {met_nothing:?} without it, {learning:?} with it"
        ));
    }
    let rate = |n: usize| (KINDS[n], before[n].as_secs_f64() / beside[n].as_secs_f64());
    Ok([rate(0), rate(1), rate(2)])
}

/// How long the longest read of a file takes when a node with a disk is silent that nobody has met yet.
///
/// # Errors
/// What failed.
pub fn longest_read() -> Result<Duration, String> {
    let (cluster, client) = with_files()?;
    cluster.world.pause(disk_node(0));
    let longest = run(&cluster, async move {
        let clock = client.runtime().clock.clone();
        let mut longest = Duration::ZERO;
        for number in 0..FILES {
            let begin = clock.monotonic();
            read(&client, &name("before", number)).await?;
            longest = longest.max(clock.monotonic() - begin);
        }
        Ok(longest)
    });
    cluster.world.resume(disk_node(0));
    longest
}

/// All disks hang, one after another of its node; what the registry says of their room meanwhile.
///
/// # Errors
/// A disk was called one without room, or is still away at the end.
fn keep_their_room() -> Result<(), String> {
    let cluster = cluster()?;
    let client = cluster.client();
    for disk in 0..DISKS {
        cluster.world.disk(disk_node(disk)).hang_after(0, Duration::from_secs(90));
    }
    let c = client.clone();
    // Somebody has to meet them.
    let meets = async move {
        let (clock, begin) = (c.runtime().clock.clone(), c.runtime().clock.monotonic());
        write(&c, &name("meets", 0)).await.ok();
        Ok(clock.monotonic() - begin)
    };
    let met_for = run(&cluster, meets)?;
    if met_for < Duration::from_secs(1) {
        return Err(format!("nobody met the disks that hang: a write took {met_for:?}"));
    }
    let without_room = run(&cluster, async move {
        let mut without_room = 0;
        for _ in 0..120 {
            let map = client.refresh_map().await?;
            without_room += map.services.iter().filter(|service| service.available_bytes == 0).count();
            client.runtime().clock.sleep(Duration::from_secs(1)).await;
        }
        write(&client, &name("after", 0)).await?;
        Ok(without_room)
    })?;
    match without_room {
        0 => Ok(()),
        times => Err(format!("disks that only hang were said to have no room, {times} times")),
    }
}

/// What is wrong.
pub fn all() -> Vec<String> {
    let slow = match rates() {
        Err(error) => vec![error],
        Ok(rates) => {
            let slow = rates.into_iter().filter(|(_, rate)| *rate < 0.8);
            slow.map(|(what, rate)| format!("{what} has {rate:.2} of its rate beside a disk that hangs"))
                .collect()
        }
    };
    let read = match longest_read() {
        Err(error) => Some(error),
        Ok(longest) if longest > LONGEST_READ => {
            Some(format!("a read beside a node that is silent took {longest:?}"))
        }
        Ok(_) => None,
    };
    slow.into_iter().chain(read).chain(keep_their_room().err()).collect()
}
