//! The topic: made where it is missing, refused where it cannot keep what the contract promises.
//!
//! Owns: what is asked of the topic. Must not know: what is written into it.

use std::time::Duration;

use rdkafka::admin::{
    AdminClient, AdminOptions, ConfigResource, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};

use super::options::KafkaOptions;
use super::session::{common_config, message_bytes_max};
use crate::backend::Warning;

/// Copies of everything, and how many of them confirm a publish, where the topic is not `small`.
const REPLICAS: usize = 3;
const REPLICAS_IN_SYNC: usize = 2;

/// How long one question to the brokers may take, in milliseconds.
const ASK_MS_MAX: u64 = 3_000;

/// Why the topic cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// The brokers do not answer. Nobody's fault; tried again.
    #[error("Kafka does not answer: {0}")]
    Unreachable(String),
    /// Channels would move between partitions. The operator's fault.
    #[error("the topic {topic} has {found} partitions and {wanted} are configured: channels would move")]
    Partitions {
        /// The topic.
        topic: String,
        /// What it has.
        found: u32,
        /// What is configured.
        wanted: u32,
    },
    /// It can lose what was acknowledged. The operator's fault.
    #[error("the topic {topic} {why}; three brokers are needed, or `small` for one")]
    Unsafe {
        /// The topic.
        topic: String,
        /// What is wrong with it.
        why: String,
    },
}

impl TopicError {
    /// Whether trying again may help without anybody's doing.
    pub const fn is_temporary(&self) -> bool {
        matches!(self, TopicError::Unreachable(_))
    }
}

fn unreachable(error: &KafkaError) -> TopicError {
    TopicError::Unreachable(error.to_string())
}

/// Makes the topic if it is missing and checks it. Gives what its configuration gives up.
pub(super) async fn ensure(options: &KafkaOptions) -> Result<Vec<String>, TopicError> {
    asked(options, true).await
}

/// Asks the brokers what the topic gives up, and makes nothing.
pub(super) async fn check(options: &KafkaOptions) -> Vec<Warning> {
    match asked(options, false).await {
        Ok(weak) => {
            let given_up =
                |weak| Warning::new(format!("Kafka: the topic {} {weak}", options.topic), UNSAFE_MEND);
            weak.into_iter().map(given_up).collect()
        }
        Err(error) => {
            let mend = match error {
                TopicError::Unreachable(_) => "start the brokers, or mend their addresses in bus.url",
                TopicError::Partitions { .. } => {
                    "name the number that the topic has in bus.url (partitions=), or another topic"
                }
                TopicError::Unsafe { .. } => UNSAFE_MEND,
            };
            vec![Warning::new(error.to_string(), mend)]
        }
    }
}

/// What mends a topic that can lose what was acknowledged.
const UNSAFE_MEND: &str = "three brokers, and a topic with 3 copies, min.insync.replicas=2, cleanup.policy=delete and \
                           unclean.leader.election.enable=false; the first node makes it so where it is missing";

/// What the topic gives up, if it can be used. Where it is missing, it is made or (`makes` is false) nothing is given up.
async fn asked(options: &KafkaOptions, makes: bool) -> Result<Vec<String>, TopicError> {
    let admin = common_config(options).create::<AdminClient<DefaultClientContext>>();
    let admin = Admin::new(admin.map_err(|error| unreachable(&error))?);
    let result = asked_by(&admin, options, makes).await;
    // Ending a client takes a moment.
    std::thread::spawn(move || drop(admin));
    result
}

async fn asked_by(admin: &Admin, options: &KafkaOptions, makes: bool) -> Result<Vec<String>, TopicError> {
    let mut found = look(admin, options).await?;
    if found.partitions == 0 {
        if found.brokers < REPLICAS && !options.small {
            let why = format!("cannot be made with {REPLICAS} copies by {} brokers", found.brokers);
            return Err(TopicError::Unsafe { topic: options.topic.clone(), why });
        }
        if !makes {
            return Ok(Vec::new());
        }
        create(admin, options, found.brokers).await?;
        found = look(admin, options).await?;
    }
    judge(admin, options, &found).await
}

type Admin = std::sync::Arc<AdminClient<DefaultClientContext>>;

struct Found {
    brokers: usize,
    /// 0: there is no such topic.
    partitions: u32,
    /// The fewest that a partition has.
    replicas: usize,
}

async fn look(admin: &Admin, options: &KafkaOptions) -> Result<Found, TopicError> {
    let (admin, topic) = (admin.clone(), options.topic.clone());
    let timeout = Duration::from_millis(ASK_MS_MAX);
    let looked = tokio::task::spawn_blocking(move || {
        let metadata = admin.inner().fetch_metadata(Some(&topic), timeout)?;
        let topic = metadata.topics().iter().find(|found| found.name() == topic && found.error().is_none());
        let partitions = topic.map_or(&[][..], |topic| topic.partitions());
        Ok(Found {
            brokers: metadata.brokers().len(),
            partitions: partitions.len() as u32,
            replicas: partitions.iter().map(|partition| partition.replicas().len()).min().unwrap_or(0),
        })
    });
    match looked.await {
        Ok(found) => found.map_err(|error: KafkaError| unreachable(&error)),
        Err(error) => Err(TopicError::Unreachable(error.to_string())),
    }
}

async fn create(admin: &Admin, options: &KafkaOptions, brokers: usize) -> Result<(), TopicError> {
    let topic = options.topic.clone();
    let replicas = if options.small { brokers.clamp(1, REPLICAS) } else { REPLICAS };
    let in_sync = if replicas < REPLICAS { 1 } else { REPLICAS_IN_SYNC }.to_string();
    let (message_bytes, retention_ms) =
        (message_bytes_max(options).to_string(), options.retention_ms.to_string());
    let partitions = options.partitions.cast_signed();
    let wanted = NewTopic::new(&topic, partitions, TopicReplication::Fixed(replicas as i32))
        .set("min.insync.replicas", &in_sync)
        .set("unclean.leader.election.enable", "false")
        .set("cleanup.policy", "delete")
        .set("retention.ms", &retention_ms)
        .set("message.timestamp.type", "LogAppendTime")
        .set("max.message.bytes", &message_bytes);
    let timeout = Some(Duration::from_millis(ASK_MS_MAX));
    let asked = AdminOptions::new().operation_timeout(timeout).request_timeout(timeout);
    let made = admin.create_topics([&wanted], &asked).await.map_err(|error| unreachable(&error))?;
    match made.into_iter().next() {
        // Another node was faster.
        Some(Err((_, Code::TopicAlreadyExists))) | Some(Ok(_)) => Ok(()),
        Some(Err((_, code))) => Err(TopicError::Unreachable(code.to_string())),
        None => Err(TopicError::Unreachable("no answer to the making of the topic".into())),
    }
}

async fn judge(admin: &Admin, options: &KafkaOptions, found: &Found) -> Result<Vec<String>, TopicError> {
    let topic = options.topic.clone();
    if found.partitions == 0 {
        return Err(TopicError::Unreachable("the topic is not there yet".into()));
    }
    if found.partitions != options.partitions {
        let (found, wanted) = (found.partitions, options.partitions);
        return Err(TopicError::Partitions { topic, found, wanted });
    }
    let weak = weaknesses(admin, options, found).await?;
    if options.small || weak.is_empty() {
        return Ok(weak);
    }
    Err(TopicError::Unsafe { topic, why: weak.join(", ") })
}

async fn weaknesses(admin: &Admin, options: &KafkaOptions, found: &Found) -> Result<Vec<String>, TopicError> {
    let timeout = Some(Duration::from_millis(ASK_MS_MAX));
    let asked = AdminOptions::new().request_timeout(timeout);
    let which = ResourceSpecifier::Topic(&options.topic);
    let answers = admin.describe_configs([&which], &asked).await.map_err(|error| unreachable(&error))?;
    let config: ConfigResource = match answers.into_iter().next() {
        Some(Ok(config)) => config,
        Some(Err(code)) => return Err(TopicError::Unreachable(code.to_string())),
        None => return Err(TopicError::Unreachable("no answer about the topic".into())),
    };
    let value = |name: &str| config.get(name).and_then(|entry| entry.value.clone()).unwrap_or_default();
    let mut weak = Vec::new();
    if found.replicas < REPLICAS {
        weak.push(format!("has {} copies of a partition, not {REPLICAS}", found.replicas));
    }
    let in_sync = value("min.insync.replicas").parse().unwrap_or(1);
    if in_sync < REPLICAS_IN_SYNC {
        weak.push(format!("acknowledges with {in_sync} copies, not {REPLICAS_IN_SYNC}"));
    }
    if value("unclean.leader.election.enable") == "true" {
        weak.push("elects replicas that are behind".into());
    }
    if value("cleanup.policy") != "delete" {
        weak.push("is compacted, which leaves holes".into());
    }
    Ok(weak)
}
