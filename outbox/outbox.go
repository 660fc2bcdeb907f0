// Package outbox keeps messages in a store until the relay has them: nothing that was enqueued is lost or sent twice, no matter
// when the process dies.
//
//	store, err := sqlitestore.Open("/var/lib/shop/outbox")
//	…
//	box, err := outbox.New(outbox.Config{Store: store, Client: client})
//	go box.Run(ctx)
//	err = box.Enqueue(ctx, outbox.Message{ID: "order-1234", From: …, To: …, Body: …}) // nil: it is durable
//
// Package sqlitestore keeps the messages in a folder, for one worker; natsstore keeps them in NATS JetStream, for several workers
// on several machines.
//
// # When you need it
//
// A service that can tell its caller "it did not work, try again" needs no outbox: it calls Send. A service that has promised a
// message (the order is placed, the response is written) and then dies would lose the message.
//
// # What is promised
//
// The state of a message is durable before what it says can happen. Before the end of a message is sent to the relay, the store has
// its intent, the state [Sending] ([smtprelay.Message].BeforeEnd). A worker that dies leaves some messages in that state: nobody
// can tell whether the relay has them. They become [Unknown], are listed, and are sent again only if [Outbox.Resolve] says so. On
// average a crash leaves a few: those between their intent and the relay's reply. A Run whose context ends leaves none if the relay
// answers within Config.Drain.
//
//	dies at                             then
//	before Enqueue has returned         the message may be queued; enqueuing the same ID again adds nothing
//	claimed, and no intent written      it is sent again
//	between intent and reply            Unknown, though perhaps never sent
//	reply is in, End not yet durable    Unknown; the relay has it
//	the relay is lost after the end     Unknown
//	the disk is full, or the store away Enqueue fails; intents fail, so nothing is sent
//
// An ID is remembered for Config.Remember after its message has ended. After that the same ID means a new message.
package outbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay"
)

// Config has the settings of an [Outbox].
type Config struct {
	// Store keeps the messages. The caller closes it, after Run has returned.
	Store Store

	// Client sends the messages. If there are several relays, set Route instead: it chooses a Client for each message.
	Client *smtprelay.Client
	Route  func(Item) *smtprelay.Client

	// Retry says when a message that was not accepted is sent again. RetryFor, if not nil, decides for each message, for example by
	// the domain of its recipients or by its route. In its argument, To has only the recipients who get the message again. Fields
	// that are zero in its result are those of Retry. A message has one schedule: if domains need different ones, enqueue one
	// message for each.
	Retry    Retry
	RetryFor func(Item) Retry

	// Intent says when the store records that a message is being sent.
	Intent IntentTime

	// Tenants returns how many messages of a tenant are sent in each of its turns; nil means 1 for all tenants. A result below 1
	// counts as 1.
	Tenants func(tenant string) int

	// InHand is how many messages are being sent at once; as many more are claimed. Small bodies are in memory. 0 means 64. Four
	// for each connection are plenty.
	InHand int

	// Remember is how long an ID is known after its message was accepted or cancelled. 0 means 24 hours.
	Remember time.Duration

	// Drain is how long Run waits for the relay's replies after its context has ended. 0 means 30 seconds.
	Drain time.Duration

	// Ended, if not nil, is called when the end of a delivery is durable, whether or not the message is sent again. It is called
	// from several goroutines at once, and delays the next messages until it returns.
	Ended func(Item)
}

// IntentTime says when the store records that a message is being sent.
type IntentTime int

const (
	// AtEnd, the default: when the body has been written. The connection waits until the intent is durable. After a crash, messages
	// between their intent and the relay's reply are Unknown, and those whose reply was not durable yet.
	AtEnd IntentTime = iota
	// Early: shortly before the message's turn on a connection, so that the connection waits less. After a crash more messages are
	// Unknown: a quarter of InHand more, or up to half of it if the store takes long for an intent.
	Early
)

// Retry says when a message that was not accepted is sent again, if smtprelay.ShouldRetry or RetryTo allows it: after First, then
// after twice that and so on up to Most, each less a random part of up to a quarter, until For has passed since it was first due.
// Then it is [Dead].
type Retry struct {
	First time.Duration // 0 means a minute
	Most  time.Duration // 0 means an hour
	For   time.Duration // 0 means 5 days (RFC 5321, 4.5.4.1)
}

// Message is a mail to be enqueued. The fields that are not explained here are those of [smtprelay.Message].
type Message struct {
	// ID identifies the message: an order's number, for example. Enqueuing the same ID again adds nothing.
	ID string

	From         string
	To           []string
	Body         io.WriterTo // written once, during Enqueue
	AllOrNothing bool
	MailOptions  *smtprelay.MailOptions
	RcptOptions  map[string]*smtprelay.RcptOptions

	// Tenant says whose message it is: tenants take turns, however many messages each has.
	Tenant string
	// Priority orders the messages of one tenant that are due: the highest goes first.
	Priority int

	// NotBefore is the earliest time to send the message; zero means at once. After NotAfter no attempt begins, and the message is
	// [Dead]; zero means no such limit.
	NotBefore, NotAfter time.Time
}

// Outbox sends the messages in a store. It is safe for concurrent use.
type Outbox struct {
	cfg    Config
	news   chan struct{} // told of something new; has room for one
	turns  chan struct{} // has one for each message in hand
	mu     sync.Mutex    // guards the fields below
	hands  map[*delivery]struct{}
	line   []*delivery   // of Early: whose intent was not started yet, in the order of their Sends
	ahead  int           // intents that were started, of messages whose end may not leave yet
	begins time.Duration // average time that the store takes for an intent
	gap    time.Duration // average time between the ends of two messages
	left   time.Time     // when the last end left
	ends   bool          // Run is to stop
	ended  Ended
}

// New returns an Outbox; Run makes it send. It is an error if Store is missing, if not exactly one of Client and Route is set, or
// if a number is negative.
func New(cfg Config) (*Outbox, error) {
	switch {
	case cfg.Store == nil:
		return nil, errors.New("outbox: Config.Store is nil")
	case (cfg.Client == nil) == (cfg.Route == nil):
		return nil, errors.New("outbox: want one of Config.Client and Config.Route")
	case cfg.InHand < 0, cfg.Remember < 0, cfg.Drain < 0, cfg.Retry.First < 0, cfg.Retry.Most < 0, cfg.Retry.For < 0:
		return nil, errors.New("outbox: a negative number in Config")
	}
	if cfg.Route == nil {
		client := cfg.Client
		cfg.Route = func(Item) *smtprelay.Client { return client }
	}
	if cfg.Tenants == nil {
		cfg.Tenants = func(string) int { return 1 }
	}
	setDefault(&cfg.InHand, 64)
	setDefault(&cfg.Remember, 24*time.Hour)
	setDefault(&cfg.Drain, 30*time.Second)
	setDefault(&cfg.Retry.First, time.Minute)
	setDefault(&cfg.Retry.Most, time.Hour)
	setDefault(&cfg.Retry.For, 5*24*time.Hour)
	return &Outbox{cfg: cfg, news: make(chan struct{}, 1), turns: make(chan struct{}, cfg.InHand), gap: slow, hands: map[*delivery]struct{}{}}, nil
}

// retry is how i is tried again.
func (c *Config) retry(i Item) Retry {
	if c.RetryFor == nil {
		return c.Retry
	}
	r := c.RetryFor(i)
	setDefault(&r.First, c.Retry.First)
	setDefault(&r.Most, max(r.First, c.Retry.Most))
	setDefault(&r.For, c.Retry.For)
	return r
}

func setDefault[T int | time.Duration](v *T, def T) {
	if *v == 0 {
		*v = def
	}
}

// Enqueue adds a message. If it returns nil, the message is durable. Otherwise it may be durable, and may be enqueued again with
// the same ID.
func (o *Outbox) Enqueue(ctx context.Context, m Message) error {
	e, err := o.entry(m)
	if err != nil {
		return err
	}
	if err := o.cfg.Store.Put(ctx, []Entry{e})[0]; err != nil {
		return err
	}
	o.tell()
	return nil
}

// enqueueTogether is how many messages of EnqueueAll are made durable together.
const enqueueTogether = 64

// EnqueueAll adds many messages, several at a time, and yields the ID of each, with a nil error if it is durable.
func (o *Outbox) EnqueueAll(ctx context.Context, messages iter.Seq[Message]) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		var batch []Entry
		flush := func() bool {
			if len(batch) == 0 {
				return true
			}
			errs := o.cfg.Store.Put(ctx, batch)
			o.tell()
			for i, e := range batch {
				if !yield(e.ID, errs[i]) {
					return false
				}
			}
			batch = batch[:0]
			return true
		}
		for m := range messages {
			e, err := o.entry(m)
			if err != nil {
				if !yield(m.ID, err) {
					return
				}
				continue
			}
			if batch = append(batch, e); len(batch) == enqueueTogether && !flush() {
				return
			}
		}
		flush()
	}
}

func (o *Outbox) tell() {
	select {
	case o.news <- struct{}{}:
	default:
	}
}

// entry checks m.
func (o *Outbox) entry(m Message) (Entry, error) {
	switch {
	case m.ID == "":
		return Entry{}, errors.New("outbox: a message without ID")
	case len(m.To) == 0:
		return Entry{}, fmt.Errorf("outbox: message %q has no recipients", m.ID)
	case m.Body == nil:
		return Entry{}, fmt.Errorf("outbox: message %q has no body", m.ID)
	}
	now := time.Now()
	due := now
	if m.NotBefore.After(now) {
		due = m.NotBefore
	}
	return Entry{Body: m.Body, Item: Item{
		ID: m.ID, Tenant: m.Tenant, Priority: m.Priority, From: m.From, To: m.To, AllOrNothing: m.AllOrNothing,
		MailOptions: m.MailOptions, RcptOptions: m.RcptOptions,
		Created: now, NotBefore: m.NotBefore, NotAfter: m.NotAfter, Due: due, Changed: now,
	}}, nil
}

// Status returns the state of a message; [ErrNotFound] if its ID is not known, or no longer known.
func (o *Outbox) Status(ctx context.Context, id string) (Item, error) {
	return o.cfg.Store.Get(ctx, id)
}

// Body returns the body of a message, to be written once and soon. [ErrNotFound] means that its ID is not known, or that the body
// is gone, as it is after the message was accepted.
func (o *Outbox) Body(ctx context.Context, id string) (io.WriterTo, error) {
	return o.cfg.Store.Body(ctx, id)
}

// List yields the messages in a state, oldest first.
func (o *Outbox) List(ctx context.Context, state State) iter.Seq2[Item, error] {
	return o.cfg.Store.List(ctx, state)
}

// Stats has the counts of an outbox.
type Stats struct {
	Stored Counts // all processes together
	InHand int    // messages that this Outbox is sending
	Ended  Ended  // deliveries of this Outbox since New
}

// Ended counts deliveries by how they ended.
type Ended struct {
	Accepted, Dead, Unknown uint64
	Deferred                uint64 // Queued again
}

// Stats asks the store how many messages are in which state. With many messages that takes a while: do not call it for each request.
func (o *Outbox) Stats(ctx context.Context) (Stats, error) {
	stored, err := o.cfg.Store.Count(ctx)
	o.mu.Lock()
	defer o.mu.Unlock()
	return Stats{Stored: stored, InHand: len(o.hands), Ended: o.ended}, err
}

// count counts a delivery that has ended.
func (o *Outbox) count(state State) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch state {
	case Accepted:
		o.ended.Accepted++
	case Queued:
		o.ended.Deferred++
	case Dead:
		o.ended.Dead++
	case Unknown:
		o.ended.Unknown++
	}
}

// Cancel cancels a message that is Queued, and reports whether it did: it is too late once the message is Sending.
func (o *Outbox) Cancel(ctx context.Context, id string) (cancelled bool, err error) {
	err = o.cfg.Store.Change(ctx, id, func(i *Item) error {
		if i.State != Queued {
			return ErrConflict
		}
		i.State, i.Changed = Cancelled, time.Now()
		return nil
	})
	if errors.Is(err, ErrConflict) {
		return false, nil
	}
	return err == nil, err
}

// Verdict says what to do with a message that is Unknown or Dead.
type Verdict int

const (
	SendAgain  Verdict = iota // to all but those who certainly have it: those who may have it may get it twice
	TakeAsSent                // the message becomes Accepted
	Drop                      // the message becomes Cancelled
)

// Resolve decides about a message that is Unknown or Dead; [ErrConflict] means that it is neither.
func (o *Outbox) Resolve(ctx context.Context, id string, v Verdict) error {
	return o.resolve(ctx, id, v, Unknown, Dead)
}

// Requeue sends a Dead message again, to those who have not got it, as Resolve with SendAgain does. [ErrConflict] means that it is not
// Dead: an Unknown message needs Resolve, since the relay may have it.
func (o *Outbox) Requeue(ctx context.Context, id string) error {
	return o.resolve(ctx, id, SendAgain, Dead)
}

// resolve decides about a message that is in one of those states.
func (o *Outbox) resolve(ctx context.Context, id string, v Verdict, from ...State) error {
	err := o.cfg.Store.Change(ctx, id, func(i *Item) error {
		now := time.Now()
		switch {
		case !slices.Contains(from, i.State):
			return ErrConflict
		case v == TakeAsSent:
			i.State = Accepted
		case v == Drop:
			i.State = Cancelled
		case v == SendAgain:
			i.State, i.Due, i.Created, i.NotAfter = Queued, now, now, time.Time{}
		default:
			return fmt.Errorf("outbox: verdict %d is none", v)
		}
		i.Changed = now
		return nil
	})
	if err == nil {
		o.tell()
	}
	return err
}
