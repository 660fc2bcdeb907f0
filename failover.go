package smtprelay

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smtprelay/smtprelay/internal/body"
)

// Failover sends through the first of several relays that works. It is safe for concurrent use; make one with [NewFailover].
//
// A message goes on to the next relay only where the one before has accepted it for nobody and it was the relay that failed:
// there was no connection to be had, or it was lost or ended with 421 before the end of the message. A message that was refused
// for itself goes no further, nor does one that may have been accepted.
//
// A relay that has failed rests: for half a minute it is asked only when all others have failed, then one message tries it,
// and the rest doubles, up to ten minutes, until it works.
type Failover struct {
	relays []*standby // in the order of preference

	mu sync.Mutex // guards the state of relays; not held while a Client is called
}

// standby is a relay of a Failover. The Failover's lock guards all but client.
type standby struct {
	client   *Client
	failures int       // in a row
	failed   time.Time // when it last did
	rests    time.Time // until then
	trying   bool      // a Send that began after its rest tells whether it works
}

const (
	restFirst = 30 * time.Second
	restMost  = 10 * time.Minute
	patience  = 5 * time.Second // with a relay through which nothing goes
)

// NewFailover returns a Failover over clients, the preferred one first. Without clients each Send is an error.
func NewFailover(clients ...*Client) *Failover {
	f := &Failover{}
	for _, c := range clients {
		f.relays = append(f.relays, &standby{client: c})
	}
	return f
}

// Send sends m as [Client.Send] does, through the first relay that works. Receipt and error are those of the relay that was asked
// last. A Body that can be written once only goes no further once it was begun.
func (f *Failover) Send(ctx context.Context, m Message) (Receipt, error) {
	used := func() bool { return false }
	if r, ok := m.Body.(io.Reader); ok && body.Once(body.Again(m.Body)) {
		watched := &watchedBody{Reader: r, body: m.Body}
		m.Body, used = watched, watched.begun.Load
	}
	receipt, err := Receipt{}, errNoRelays()
	failFast, relays := m.FailFast, f.order()
	for i, relay := range relays {
		m.FailFast = failFast || i < len(relays)-1 // the last one is waited for
		began, accepted := time.Now(), relay.client.Stats().Accepted
		receipt, err = relay.client.Send(ctx, m)
		if failed := f.note(ctx, relay, began, accepted, err); !failed || ctx.Err() != nil || used() {
			break
		}
	}
	return receipt, err
}

// SendMail has the shape of net/smtp's function: see [Client.SendMail].
func (f *Failover) SendMail(from string, to []string, msg []byte) error {
	_, err := f.Send(context.Background(), Message{From: from, To: to, Body: Bytes(msg), AllOrNothing: true})
	return err
}

// Ping asks all relays at once, as [Client.Ping] does, and returns nil when one has answered. Else the error tells of all.
func (f *Failover) Ping(ctx context.Context) error {
	ctx, enough := context.WithCancel(ctx)
	defer enough()
	answers := make(chan error, len(f.relays))
	for _, relay := range f.relays {
		go func() { answers <- relay.client.Ping(ctx) }() // ends with ctx
	}
	errs := make([]error, len(f.relays))
	for i := range errs {
		if errs[i] = <-answers; errs[i] == nil {
			return nil
		}
	}
	if len(errs) == 0 {
		return errNoRelays()
	}
	return errors.Join(errs...)
}

// Shutdown shuts all Clients down at once, as [Client.Shutdown] does.
func (f *Failover) Shutdown(ctx context.Context) error {
	var clients []*Client
	for _, relay := range f.relays {
		clients = append(clients, relay.client)
	}
	return shutdownAll(ctx, clients)
}

func errNoRelays() error {
	return &Error{Op: OpConfig, Outcome: NotAccepted, Scope: ScopeCaller, Err: errors.New("the Failover has no Clients"), permanent: true}
}

// order returns the relays in the order in which a Send that begins now asks them: those that rest, or that another Send tries after
// their rest, come last.
func (f *Failover) order() []*standby {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	var ready, resting []*standby
	for _, relay := range f.relays {
		switch {
		case relay.failures == 0:
			ready = append(ready, relay)
		case relay.trying || now.Before(relay.rests):
			resting = append(resting, relay)
		case len(ready) == 0: // it is asked in any case
			relay.trying = true
			ready = append(ready, relay)
		default:
			resting = append(resting, relay)
		}
	}
	slices.SortStableFunc(resting, func(a, b *standby) int { return a.rests.Compare(b.rests) })
	return append(ready, resting...)
}

// note takes in what became of a Send through relay, which began at began when so many had been accepted, and reports whether
// the relay has failed.
func (f *Failover) note(ctx context.Context, relay *standby, began time.Time, accepted int64, err error) (failed bool) {
	e, _ := errors.AsType[*Error](err)
	switch {
	case e == nil || e.Outcome != NotAccepted:
	case ctx.Err() != nil: // which says nothing of the relay, unless there was no connection for long, and for nobody
		failed = e.Op == OpWait && time.Since(began) >= patience && relay.client.Stats().Accepted == accepted
	default:
		failed = e.Scope == ScopeRelay && e.Op != OpConfig
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch now := time.Now(); {
	case failed:
		if began.Before(relay.failed) {
			break // another Send has told of this failure
		}
		relay.failed, relay.trying = now, false
		relay.failures++
		relay.rests = now.Add(min(restFirst<<min(relay.failures-1, 10), restMost))
	case e == nil, e.Reply.Code != 0:
		relay.failures, relay.trying = 0, false // it has spoken about the message
	default:
		relay.trying = false // nothing is known
	}
	return failed
}

// watchedBody is a body that can be written once only, which tells whether it was begun.
type watchedBody struct {
	io.Reader
	body  io.WriterTo
	begun atomic.Bool
}

func (b *watchedBody) Read(p []byte) (int, error) {
	b.begun.Store(true)
	return b.Reader.Read(p)
}

// WriteTo implements io.WriterTo.
func (b *watchedBody) WriteTo(w io.Writer) (int64, error) {
	b.begun.Store(true)
	return b.body.WriteTo(w)
}
