//! Names that have one hash, as a script may ask for them.

use bytes::Bytes;
use clutch_client::ClientError;
use clutch_proto::{InodeId, name::hash63};

use crate::{SimCluster, workload::attributes};

/// What XXH3 begins its secret with, which is public.
///
/// A name of 17 to 32 bytes is hashed as its first and its last 16 bytes apart from each other. Of each half, one word is
/// multiplied with the other after the secret was added to both without carry: when the first word is the secret's, the
/// product is 0 whatever the second one is.
const SECRET: [u8; 8] = [0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe];
/// What all colliding names end with: the half of them that counts.
const END: &[u8; 16] = b"-a-name-of-many-";

/// The n-th of the names that have one hash.
pub fn colliding(n: u32) -> Vec<u8> {
    [&SECRET[..], format!("{n:08}").as_bytes(), END].concat()
}

/// A script's path with every name that ends with an even number, such as `f4`, in place of a colliding one. Letter and
/// number are in it, so that different names stay different.
pub fn collide(path: &str) -> Vec<u8> {
    let name = |text: &str| match even_number(text) {
        Some((letter, number)) => colliding(u32::from(letter) * 100_000 + number),
        None => text.as_bytes().to_vec(),
    };
    path.split('/').map(name).collect::<Vec<_>>().join(&b'/')
}

/// The letter and the number of a name that has nothing else, when the number is even.
fn even_number(text: &str) -> Option<(u8, u32)> {
    let (letter, number) = text.split_at_checked(1)?;
    let number: u32 = number.parse().ok().filter(|n| n % 2 == 0 && *n < 100_000)?;
    Some((letter.as_bytes()[0], number))
}

/// The hash that all of [`colliding`] have.
pub fn colliding_hash() -> u64 {
    hash63(&colliding(0))
}

/// Paths through directories whose names have one hash, by a client that keeps what it has looked up, also while it renames
/// them itself; what is wrong.
pub fn paths() -> Vec<String> {
    let cluster = SimCluster::start(5, 2, 3);
    let client = cluster.keeping_client();
    cluster.run(async move {
        let (a, b, c) = (colliding(1), colliding(2), colliding(3));
        let path = |dir: &[u8]| [b"/", dir, b"/f"].concat();
        let mut wrong = Vec::new();
        let made = async {
            for dir in [&a, &b] {
                let name = Bytes::copy_from_slice(dir);
                let made = client.make_directory(InodeId::ROOT, &name, attributes()).await?;
                let content: &[u8] = dir;
                client.write_file(made.id, &"f".into(), attributes(), false, &mut &content[..]).await?;
            }
            for dir in [&a, &b, &a] {
                let found = client.resolve(path(dir)).await?;
                let mut bytes = Vec::new();
                let mut sink = |part: Bytes| {
                    bytes.extend_from_slice(&part);
                    Ok(())
                };
                client.read_file(found.id, &mut sink).await?;
                if bytes != *dir {
                    wrong.push(format!(
                        "{:?} leads to the file of {:?}",
                        Bytes::copy_from_slice(dir),
                        Bytes::from(bytes)
                    ));
                }
            }
            // Its own renames it knows at once.
            let at = client.resolve([b"/", &a[..]].concat()).await?;
            client.rename(&at, InodeId::ROOT, &Bytes::copy_from_slice(&c)).await?;
            if client.resolve(path(&a)).await.is_ok() {
                wrong.push("what was renamed is still found by its old name".to_owned());
            }
            let at = client.resolve([b"/", &b[..]].concat()).await?;
            client.rename(&at, InodeId::ROOT, &Bytes::copy_from_slice(&a)).await?;
            let (found, file) = (client.resolve(path(&a)).await?, client.lookup(at.id, &"f".into()).await?);
            if found.id.raw() != file.target {
                wrong.push("a new name leads to what had it before".to_owned());
            }
            Ok::<_, ClientError>(())
        };
        if let Err(error) = made.await {
            wrong.push(error.to_string());
        }
        wrong
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_collide_and_are_names() {
        for n in [1, 7, 99_999_999] {
            assert_eq!(hash63(&colliding(n)), colliding_hash());
            assert!(clutch_proto::name::check(&colliding(n)).is_ok());
        }
        let (a, b) = (collide("/d0/f4/f5"), collide("/d2/f6/f5"));
        let names = |path: &[u8]| path.split(|b| *b == b'/').map(hash63).collect::<Vec<_>>();
        assert_eq!(names(&a), names(&b));
        assert_ne!(a, b);
        assert_eq!(collide("/"), b"/");
    }

    #[test]
    fn paths_through_them_lead_where_they_say() {
        assert_eq!(paths(), Vec::<String>::new());
    }
}
