//! Into a channel homed here, and to this shard's subscribers of any channel.
//!
//! Owns the way of a publication from its publisher through the bus to the logs of this shard's
//! variants. It must not know who is a subscriber nor when a log is sent: that is [`super::super::fanout`]'s.
//!
//! Invariants:
//! * the publisher is answered before the publication is delivered, so its own copy follows the ack;
//! * a channel's position moves only together with the logs of its variants.

use ringmain_bus::{Accepted, Epoch, Outcome, PublicationId};
use ringmain_proto::close::ErrorCode;
use ringmain_proto::codec::Codec;
use ringmain_proto::message::{Publication, Push};
use ringmain_proto::time::Now;

use super::waiters::Waiter;
use super::{Publisher, bus_channel, no_channel, publish_error};
use crate::core::engine::ShardIndex;
use crate::core::latest::KEY_TAG;
use crate::core::mesh::ToMember;
use crate::core::metrics::Metric;
use crate::core::shard::Core;

impl Core {
    /// Publishes into a channel homed here.
    pub(crate) fn publish_at_home(
        &mut self,
        from: ShardIndex,
        publisher: Publisher,
        channel: &str,
        key: Option<&str>,
        publication: &mut Publication<'_>,
        now: Now,
    ) {
        let index = match self.channels.get_or_create(channel) {
            Ok(index) => index,
            Err(reason) => return self.published(from, publisher, Err(no_channel(reason)), now),
        };
        self.publish_into(from, publisher, index, key, publication, now);
    }

    /// The same for a channel that is known.
    pub(crate) fn publish_into(
        &mut self,
        from: ShardIndex,
        publisher: Publisher,
        index: u32,
        key: Option<&str>,
        publication: &mut Publication<'_>,
        now: Now,
    ) {
        let token = self.waiters.token();
        let id = match key {
            Some(key) => PublicationId::Key(key),
            None => PublicationId::Node { incarnation: self.waiters.incarnation, sequence: token.0 },
        };
        let Self { bus, channels, .. } = self;
        let target = bus_channel(channels, index);
        match bus.publish(now, token, target, id, publication) {
            Outcome::Pending => {
                self.waiters.waiting.insert(token.0, Waiter::Publish(from, publisher));
            }
            Outcome::Done(Ok(accepted)) => {
                self.published(from, publisher, Ok(accepted), now);
                if !accepted.repeated {
                    self.metrics.add(Metric::Publications, 1);
                    publication.offset = accepted.position.offset;
                    self.deliver(index, accepted.position.epoch.get(), publication, now);
                }
            }
            Outcome::Done(Err(error)) => self.published(from, publisher, Err(publish_error(error)), now),
        }
    }

    pub(super) fn published(
        &mut self,
        from: ShardIndex,
        publisher: Publisher,
        result: Result<Accepted, ErrorCode>,
        now: Now,
    ) {
        if matches!(result, Err(ErrorCode::TooManyRequests)) {
            self.metrics.add(Metric::DropPublishRefused, 1);
        }
        match publisher {
            Publisher::Client(origin) => {
                let result = result.map(|_| ());
                if from == self.shard {
                    self.publish_answered(origin, result, now);
                } else {
                    self.send_member(from, ToMember::Published { origin, result }, now);
                }
            }
            Publisher::Call(token) => self.call_published(token, result.map(|accepted| accepted.position)),
        }
    }

    /// A publication of a channel homed here: to this shard's subscribers and to the relay.
    pub(crate) fn deliver(&mut self, index: u32, epoch: u64, publication: &Publication<'_>, now: Now) {
        self.deliver_local(index, epoch, publication);
        self.append_to_relay(index, publication, now);
    }

    /// To this shard's subscribers alone: one frame per variant, at the end of its log.
    pub(crate) fn deliver_local(&mut self, index: u32, epoch: u64, publication: &Publication<'_>) {
        let channel = self.channels.get_mut(index);
        let before = channel.top;
        let mut is_new_epoch = false;
        if publication.offset == 0 {
            self.snapshots.missed(index);
        } else {
            is_new_epoch = publication.offset == 1 || channel.epoch != 0 && channel.epoch != epoch;
            channel.epoch = epoch;
            channel.top = publication.offset;
        }
        if let Some(latest) = &mut channel.latest {
            self.scratch.clear();
            publication.write_record(&mut self.scratch);
            latest.note(publication.tags.get(KEY_TAG).unwrap_or(""), &self.scratch);
        }
        if is_new_epoch {
            // The first of an epoch tells it: to clients it may be new.
            let epoch = Epoch::new(epoch).text();
            let publication = Publication { epoch: Some(epoch.as_str().into()), ..publication.clone() };
            self.append_publication(index, before, &publication);
        } else {
            self.append_publication(index, before, publication);
        }
    }

    fn append_publication(&mut self, index: u32, before: u64, publication: &Publication<'_>) {
        for variant in 0..self.channels.get(index).variants.len() {
            self.append_to_variant(index, variant as u8, Some(before), |codec, channel, out| {
                codec.encode_push(&Push::Publication { channel, publication }, out);
            });
        }
    }

    /// Appends one frame to a variant's log, if anybody receives from it. `before` is the channel's top
    /// before this publication; `None`: it is a join or leave.
    pub(super) fn append_to_variant(
        &mut self,
        index: u32,
        variant: u8,
        before: Option<u64>,
        encode: impl FnOnce(Codec, &str, &mut Vec<u8>),
    ) {
        if let Some(appended) = self.channels.append(index, variant, before, encode) {
            self.appended(index, variant, appended);
        }
    }
}
