// Package natsstore keeps the messages of an outbox in NATS JetStream, for several workers on several machines:
//
//	nc, err := natsstore.Connect("nats://one:4222,nats://two:4222,nats://three:4222")
//	store, err := natsstore.New(nc, natsstore.Options{Replicas: 3})
//	…
//	box, err := outbox.New(outbox.Config{Store: store, Client: client})
//
// Package embedded has a server for a machine that wants none beside the program; there sqlitestore does the same with
// a fraction of the writes. Package natsslots shares the relay's allowance of connections among the workers.
//
// # How it works
//
// A stream holds two records of a message: its mail, with envelope and body as they were enqueued, and its state. What becomes of it
// in the end is written in the mail's place. Each write is a compare-and-set, which names the last record of both; the intent ([outbox.Sending])
// is one of them.
// Whatever a worker does that was paused, cut off or given up for dead, it cannot write an intent for a message that somebody else has
// touched, and without an intent it does not send. A write whose answer was lost is told from another worker's by a random number in it.
//
// Each worker follows the stream and holds in memory, without bodies, what is not over. The messages are shared among the workers
// by a hash of the ID. A worker that joins or leaves moves only its own share. Each writes a message of its own every fifth of
// Options.Lease. One of whom nothing was seen for a lease, while others have seen their own messages, is buried by them: what it was
// sending becomes [outbox.Unknown], and its share is theirs. While the servers are away nobody is buried, and nobody sends.
//
// # What is promised, and by whom
//
// A nil error says that the servers have acknowledged. What that is worth is in their configuration:
//
//   - sync_interval: always (in the block jetstream of nats-server.conf; package embedded does so). Without it, NATS acknowledges
//     before its fsync, which is up to two minutes later. With one replica a power cut then loses intents, and a lost intent is a
//     message that is sent twice; with three it takes two power cuts, or one while another server is slow.
//   - Options.Replicas 3, on three machines: one may be lost for good. With 1 the disk of the one server is all there is.
//
// Known holes: the analysis of release 2.12.1 at https://jepsen.io/analyses/nats-2.12.1 (issues 7545, 7549, 7556 and 7564 of nats-server)
// lost acknowledged messages where data files or snapshots were damaged on a minority of the servers, with sync_interval: always
// too, and where power was cut without it. Run on disks that notice their errors, and watch the servers' logs.
//
// # What happens when
//
//	a worker dies                        what it was sending is Unknown a lease later; the rest is sent by the others
//	a worker is paused beyond its lease  the same; when it goes on, its intents fail, and what it had sent is not written down
//	it is paused between intent and end  somebody may have said SendAgain meanwhile: only then the relay gets it twice
//	one server of three dies             a pause, as long as an election: up to some seconds; nothing is lost
//	two of three, or the network         Enqueue fails, intents fail: nothing is sent until they are back
//	the disks are full                   the same; make room, since ends need it too
//	all servers at once, then back       as after a pause of all workers: nobody is buried for it
//
// # Sizes
//
// A message is three writes: mail, intent, and end, by which its ID is known until Config.Remember has passed. A body larger than half of the servers' max_payload is in parts, which are records too: an object
// store would keep a marker of each for good. A worker holds about 400 octets in memory for each message that is not over, the servers
// about 300 for each subject, of which there are two for each message that is known. Messages beyond some millions, or
// thousands a second, are for several stores with names of their own: choose one by a hash of the ID.
package natsstore
