//! Answers as a server sends them: whatever comes, the client library returns an error or an answer. The input is a
//! list of answers, each with a length of two bytes; they are given in turn.
#![no_main]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use clutch_client::{Client, ClientOptions};
use clutch_proto::InodeId;
use clutch_runtime::{
    Answers, BoxFuture, Endpoint, Handled, Handler,
    simulated::{NodeId, World},
};
use libfuzzer_sys::fuzz_target;

struct Canned(Mutex<std::collections::VecDeque<Bytes>>);

impl Handler for Canned {
    fn handle(&self, _request: Bytes, _: Answers) -> BoxFuture<Handled> {
        let mut answers = self.0.lock().expect("not poisoned");
        let answer = answers.pop_front().unwrap_or_default();
        answers.push_back(answer.clone());
        Box::pin(async move { Handled { answer: answer.into(), ..Handled::default() } })
    }
}

fuzz_target!(|data: &[u8]| {
    let mut answers = std::collections::VecDeque::new();
    let mut data = data;
    while let Some((length, rest)) = data.split_first_chunk::<2>() {
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        answers.push_back(Bytes::copy_from_slice(&rest[..length]));
        data = &rest[length..];
    }
    let world = World::new(1);
    let server = world.node(NodeId(1));
    let at = Endpoint::from("server");
    let handler = Arc::new(Canned(Mutex::new(answers)));
    let listen_at = at.clone();
    let _listening = world.run(NodeId(1), Duration::from_secs(1), async move {
        server.network.listen(&listen_at, handler).await.expect("a free name")
    });
    let options = ClientOptions { patience: Duration::from_millis(100), ..ClientOptions::default() };
    let client = Client::new(world.node(NodeId(2)), at, options);
    world.run(NodeId(2), Duration::from_secs(60), async move {
        let _ = client.refresh_map().await;
        let _ = client.resolve("/a/b").await;
        let _ = client.stat(InodeId::ROOT).await;
        let _ = client.read_dir_page(InodeId::ROOT, &Default::default(), 0).await;
        let file = InodeId::from_wire(0x8000_0000_0000_0200).expect("a file's id");
        let _ = client.read_range(file, 10, 100).await;
        let _ = client.read_file(file, &mut |_| Ok(())).await;
        let _ = client.write_file(InodeId::ROOT, &"n".into(), Default::default(), true, &mut &[9u8; 300][..]).await;
    });
});
