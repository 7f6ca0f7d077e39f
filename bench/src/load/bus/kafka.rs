//! Kafka by `rdkafka`: an idempotent producer with acks=all, a consumer without a group.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::{ClientContext, DefaultClientContext};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use super::pace::{Pacer, block_until, now_ns};
use super::{BusError, Flow, OPEN_MAX, Receiver, failed, payload, runtime};
use crate::io::alarm;
use crate::io::board::Phase;
use crate::plan::{BusPlan, Pace};

/// Partitions of the topic, as many as a node's by default.
const PARTITIONS: i32 = 16;
/// Copies where there are as many brokers.
const REPLICAS: usize = 3;
/// How long a consumer waits for a message before it looks for another phase.
const POLL: Duration = Duration::from_millis(20);
/// How long the producer may take to say what became of the rest.
const FLUSH_MAX: Duration = Duration::from_secs(10);

/// Counts what the broker has confirmed.
struct Confirmed(Arc<Flow>);

impl ClientContext for Confirmed {}

impl ProducerContext for Confirmed {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        self.0.confirmed.fetch_add(1, Ordering::Relaxed);
        if result.is_err() {
            self.0.problem("a publish was not delivered");
        }
    }
}

fn config(plan: &BusPlan) -> ClientConfig {
    let rest = plan.url.split_once("://").map_or("", |(_, rest)| rest);
    let brokers = rest.split(['/', '?']).next().unwrap_or(rest);
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers.rsplit('@').next().unwrap_or(brokers));
    config
}

fn make_topic(plan: &BusPlan) -> Result<(), BusError> {
    let admin: AdminClient<DefaultClientContext> =
        config(plan).create().map_err(|error| failed("the client", error))?;
    let brokers = admin.inner().fetch_metadata(None, OPEN_MAX).map_err(|error| failed("connect", error))?;
    let replicas = brokers.brokers().len().min(REPLICAS);
    let mut topic = NewTopic::new(&plan.prefix, PARTITIONS, TopicReplication::Fixed(replicas as i32));
    if replicas == REPLICAS {
        topic = topic.set("min.insync.replicas", "2");
    }
    let options = AdminOptions::new().operation_timeout(Some(OPEN_MAX));
    let made = runtime()?.block_on(admin.create_topics([&topic], &options));
    for result in made.map_err(|error| failed("create topic", error))? {
        match result {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((_, code)) => return Err(failed("create topic", code)),
        }
    }
    await_topic(plan, &admin)
}

/// A topic is there some time after it was made.
fn await_topic(plan: &BusPlan, admin: &AdminClient<DefaultClientContext>) -> Result<(), BusError> {
    let started = std::time::Instant::now();
    loop {
        let metadata = admin.inner().fetch_metadata(Some(&plan.prefix), OPEN_MAX);
        let led = metadata.is_ok_and(|metadata| {
            metadata.topics().iter().any(|topic| {
                topic.partitions().len() == PARTITIONS as usize
                    && topic.partitions().iter().all(|partition| partition.leader() >= 0)
            })
        });
        if led {
            return Ok(());
        }
        if started.elapsed() > OPEN_MAX {
            return Err(failed("create topic", "its partitions have no leaders"));
        }
        std::thread::sleep(POLL);
    }
}

pub(super) fn publish(plan: &BusPlan, flow: &Arc<Flow>) -> Result<(), BusError> {
    make_topic(plan)?;
    let made = config(plan)
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("linger.ms", "0")
        .create_with_context(Confirmed(Arc::clone(flow)));
    let producer: BaseProducer<Confirmed> = made.map_err(|error| failed("the producer", error))?;
    let (timer, mut pacer) = (alarm::create()?, Pacer::new(plan.pace, flow));
    flow.ready();
    while let Some((batch, next_ns)) = pacer.due() {
        for due in batch {
            let (key, payload) = (super::channel(plan, due.number), payload(plan.size, due.meant_ns));
            let partition = (due.number % plan.channels) as i32 % PARTITIONS;
            let mut record = BaseRecord::to(&plan.prefix).key(&key).payload(&payload).partition(partition);
            while let Err((error, back)) = producer.send(record) {
                if error != KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull) {
                    return Err(failed("publish", error));
                }
                record = back;
                producer.poll(POLL);
            }
        }
        producer.poll(Duration::ZERO);
        match plan.pace {
            Pace::PerSecond(_) => block_until(&timer, next_ns)?,
            // What opens the window are confirmations, which a poll waits for.
            Pace::Window(_) if next_ns > now_ns() => {
                producer.poll(Duration::from_millis(1));
            }
            Pace::Window(_) => {}
        }
    }
    producer.flush(FLUSH_MAX).map_err(|error| failed("flush", error))?;
    let admin: AdminClient<DefaultClientContext> =
        config(plan).create().map_err(|error| failed("the client", error))?;
    let gone = runtime()?.block_on(admin.delete_topics(&[&plan.prefix], &AdminOptions::new()));
    gone.map(drop).map_err(|error| failed("delete topic", error))
}

pub(super) fn subscribe(plan: &BusPlan, receiver: &mut Receiver) -> Result<(), BusError> {
    make_topic(plan)?;
    let made = config(plan)
        .set("group.id", &plan.prefix)
        .set("enable.auto.commit", "false")
        .set("fetch.wait.max.ms", "5")
        .create();
    let consumer: BaseConsumer = made.map_err(|error| failed("the consumer", error))?;
    let mut partitions = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        let added = partitions.add_partition_offset(&plan.prefix, partition, Offset::Beginning);
        added.map_err(|error| failed("assign", error))?;
    }
    consumer.assign(&partitions).map_err(|error| failed("assign", error))?;
    receiver.flow.ready();
    while receiver.flow.phase() != Phase::Finish {
        match consumer.poll(POLL) {
            Some(Ok(message)) => receiver.take(message.payload().unwrap_or_default()),
            Some(Err(error)) => receiver.flow.problem(&format!("the consumer: {error}")),
            None => {}
        }
    }
    Ok(())
}
