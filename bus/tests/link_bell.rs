//! The bell between shards and hub, with a thread on each side.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use ringmain_bus::link::{Bell, LinkOptions, Told, link};
use ringmain_bus::{
    Bus, Channel, ChannelId, ChannelOptions, Health, Outcome, PublicationId, PublishError, Token,
};
use ringmain_proto::message::Publication;
use ringmain_proto::time::Now;

const NOW: Now = Now { mono_ms: 1, unix_ms: 1 };

/// What is published at any moment of a mute and its end is taken.
#[test]
fn nothing_published_is_forgotten() {
    const ROUNDS: u64 = 20_000;
    let (rung, rings) = channel();
    let bell = Bell::new(Arc::new(move || rung.send(()).unwrap()));
    let (mut port, mut end) = link(LinkOptions::default(), bell.clone(), Arc::new(|| ()));
    end.tell(Told::Health { health: Health::Up, reachable: true }).unwrap();
    std::thread::scope(|scope| {
        let ((start, started), (finish, finished)) = (channel(), channel());
        scope.spawn(move || {
            let channel = Channel { id: ChannelId(1), name: "room:1", options: &ChannelOptions::EPHEMERAL };
            let publication = Publication { data: b"x", ..Publication::default() };
            while let Ok(round) = started.recv() {
                port.poll(NOW, &mut |_| ());
                (0..round % 64).for_each(|_| std::hint::spin_loop());
                let id = PublicationId::Node { incarnation: 1, sequence: round };
                let outcome = port.publish(NOW, Token(round), channel, id, &publication);
                assert!(matches!(outcome, Outcome::Pending));
                port.flush();
                finish.send(()).unwrap();
            }
        });
        for round in 0..ROUNDS {
            bell.mute();
            start.send(round).unwrap();
            (0..round % 4_096).for_each(|_| std::hint::spin_loop());
            bell.unmute();
            // As the hub does, which looks when it is rung.
            let mut taken = None;
            while taken.is_none() {
                rings.recv_timeout(Duration::from_secs(30)).expect("a ring");
                taken = end.command();
            }
            // A ring too many would hide that the next one is missing.
            finished.recv().unwrap();
            while rings.try_recv().is_ok() {}
            let result = Err(PublishError::Unavailable);
            end.tell(Told::Published { token: Token(round), result }).unwrap();
        }
    });
}
