// Package natsstore keeps the messages of an outbox in NATS JetStream, for several workers on several machines:
//
//	nc, err := natsstore.Connect("nats://one:4222,nats://two:4222,nats://three:4222")
//	store, err := natsstore.New(nc, natsstore.Options{Replicas: 3})
//	…
//	box, err := outbox.New(outbox.Config{Store: store, Client: client})
//
// Package embedded runs a server in the program, for one machine; there sqlitestore does the same with a fraction of the writes.
// Package natsslots shares the relay's allowance of connections among the workers.
//
// # How it works
//
// A stream holds two records of a message: its mail, with envelope and body as they were enqueued, and its state. The final outcome
// replaces the mail. Each write, the intent ([outbox.Sending]) included, is a compare-and-set that names the last record of both.
// So a worker that was paused, cut off or taken for dead cannot write an intent for a message that another worker has changed, and
// without an intent it does not send. If the answer to a write is lost, a random number in the record tells the worker's own write
// from another worker's.
//
// Each worker follows the stream and holds all unfinished messages in memory, without bodies. A hash of the ID divides the messages
// among the workers. A worker that joins or leaves moves only its own share. Each worker writes a heartbeat every fifth of
// Options.Lease. If a worker writes none for a lease, while others see their own heartbeats, they declare it dead: what it was
// sending becomes [outbox.Unknown], and they take over its share. While the servers are away no worker is declared dead, and none
// sends.
//
// # What is promised, and by whom
//
// A nil error means that the servers have acknowledged. What that is worth depends on their configuration:
//
//   - sync_interval: always (in the block jetstream of nats-server.conf; package embedded does so). Without it, NATS acknowledges
//     before its fsync, which is up to two minutes later. With one replica a power cut then loses intents, and a lost intent is a
//     message that is sent twice; with three it takes two power cuts, or one while another server is slow.
//   - Options.Replicas 3, on three machines: one may be lost for good. With 1 the disk of the one server is all there is.
//
// Known holes: in the analysis of release 2.12.1 at https://jepsen.io/analyses/nats-2.12.1 (issues 7545, 7549, 7556 and 7564 of
// nats-server) acknowledged messages were lost if data files or snapshots were damaged on a minority of the servers, even with
// sync_interval: always, and if power was cut without it. Use disks that detect their errors, and watch the servers' logs.
//
// # What happens when
//
//	a worker dies                        what it was sending is Unknown a lease later; the others send the rest
//	a worker is paused beyond its lease  the same; when it goes on, its intents fail, and the outcome of what it had sent is not recorded
//	it is paused between intent and end  somebody may choose SendAgain meanwhile: only then the relay gets the message twice
//	one server of three dies             a pause, as long as an election: up to some seconds; nothing is lost
//	two of three, or the network         Enqueue fails, intents fail: nothing is sent until they are back
//	the disks are full                   the same; make room, since recording an end needs it too
//	all servers at once, then back       as after a pause of all workers: none is declared dead
//
// # Sizes
//
// A message takes three writes: mail, intent, and end, which keeps its ID known until Config.Remember has passed. A body larger
// than half of the servers' max_payload is split into parts, which are records too: an object store would keep a marker of each for
// ever. A worker holds about 400 octets in memory for each unfinished message, the servers about 300 for each subject; each known
// message has two subjects. For more than some millions of messages, or thousands a second, use several stores with different
// names, and choose one by a hash of the ID.
package natsstore
