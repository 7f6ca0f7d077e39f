# Apache Kafka in KRaft mode on loopback: three nodes that are brokers and controllers, or one.
#
# Owns: its configuration. Sourced by `up` and `status`.
# shellcheck shell=bash

KAFKA_HEAP=${KAFKA_HEAP:-256m}

# How long a node may take to start, in seconds.
KAFKA_READY_S=120

# kafka_java NODE-DIRECTORY LOG-LEVEL: the words of the command, one a line.
kafka_java() {
  printf '%s\n' java -Xms64m "-Xmx$KAFKA_HEAP" -Xss512k -XX:+UseSerialGC -XX:TieredStopAtLevel=1 \
    -XX:MaxMetaspaceSize=128m -Djava.awt.headless=true "-Duser.home=$1" \
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=$2" -Dorg.slf4j.simpleLogger.showDateTime=true \
    -Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS -cp "$BROKERS/kafka-$KAFKA_VERSION/*"
}

# kafka_servers COUNT
kafka_servers() {
  local count=$1 ports i node voters='' urls='' cluster query=''
  # One broker keeps one copy: the nodes want to be told that this is meant.
  [ "$count" -ge 3 ] || query='?small=true'
  have java || die 'java is missing' 'deploy/local/install kafka'
  [ -e "$BROKERS/kafka-$KAFKA_VERSION/complete" ] ||
    die "Kafka is missing in $BROKERS/kafka-$KAFKA_VERSION" 'deploy/local/install kafka'
  read -ra ports <<< "$(free_ports $((count * 2)))"
  cluster=$(head -c16 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=')
  for ((i = 0; i < count; i++)); do voters+=${voters:+,}$((i + 1))@127.0.0.1:${ports[count + i]}; done
  for ((i = 0; i < count; i++)); do
    kafka_start "$((i + 1))" "$count" "${ports[i]}" "${ports[count + i]}" "$voters" "$cluster"
  done
  for ((node = 1; node <= DOORS; node++)); do
    urls=$(awk -v node="$node" '$1 == node { printf "%s127.0.0.1:%s", sep, $2; sep = "," }' "$STATE/doors/table")
    printf '%s\n' --bus "kafka://$urls$query" > "$STATE/doors/$node"
  done
  for ((i = 1; i <= count; i++)); do
    ready "kafka-$i" "$KAFKA_READY_S" grep -q 'Kafka Server started' "$(record "kafka-$i")/log" || return 1
  done
  echo "kafka://$(printf ',127.0.0.1:%s' "${ports[@]:0:count}" | cut -c2-)$query"
}

# kafka_start ID COUNT PORT CONTROLLER-PORT VOTERS CLUSTER
kafka_start() {
  local at java format listeners='' advertised='' protocols='' replicas=1 in_sync=1
  [ "$2" -lt 3 ] || { replicas=3 in_sync=2; }
  at=$(prepare "kafka-$1" kafka "$3")
  kafka_doors
  cat > "$at/conf" << EOF
process.roles=broker,controller
node.id=$1
controller.quorum.voters=$5
listeners=PLAINTEXT://127.0.0.1:$3,CONTROLLER://127.0.0.1:$4$listeners
advertised.listeners=PLAINTEXT://127.0.0.1:$3$advertised
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT$protocols
inter.broker.listener.name=PLAINTEXT
log.dirs=$at/data
default.replication.factor=$replicas
min.insync.replicas=$in_sync
unclean.leader.election.enable=false
offsets.topic.replication.factor=$replicas
transaction.state.log.replication.factor=$replicas
transaction.state.log.min.isr=$in_sync
share.coordinator.state.topic.replication.factor=$replicas
share.coordinator.state.topic.min.isr=$in_sync
auto.create.topics.enable=false
# A dead leader is replaced in 3 s instead of 9.
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=300
controller.quorum.fetch.timeout.ms=1000
controller.quorum.election.timeout.ms=500
# Small: for a laptop.
num.partitions=1
num.network.threads=2
num.io.threads=2
background.threads=2
offsets.topic.num.partitions=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.num.partitions=1
group.initial.rebalance.delay.ms=0
log.cleaner.dedupe.buffer.size=16777216
log.cleaner.threads=1
EOF
  mapfile -t java < <(kafka_java "$at" warn)
  format="[ -e data/meta.properties ] ||$(printf ' %q' "${java[@]}" kafka.tools.StorageTool format -t "$6" -c "$at/conf")"
  mapfile -t java < <(kafka_java "$at" info)
  command_of "kafka-$1" "$format" -- "${java[@]}" kafka.Kafka "$at/conf"
  launch "kafka-$1"
}

# kafka_doors: a broker tells its clients where to go, so each node gets a listener that names its door.
kafka_doors() {
  local node inside
  for ((node = 1; node <= DOORS; node++)); do
    inside=$(free_ports 1)
    listeners+=,DOOR$node://127.0.0.1:$inside
    advertised+=,DOOR$node://127.0.0.1:$(door "$node" "$inside")
    protocols+=,DOOR$node:PLAINTEXT
  done
}

# kafka_health PORT: whether it takes connections; which broker leads is not asked.
kafka_health() {
  if (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; then echo 'takes connections'; else echo 'no answer'; fi
}
