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

// Failover sends through the first of several relays that works. Make one with [NewFailover]. It is safe for concurrent use.
//
// A message goes to the next relay only if the previous relay has accepted it for no recipient and the relay was at fault
// ([ScopeRelay]): no connection could be opened, or it was lost or ended with 421 before the end of the message was sent. A message
// that a relay has refused, or may have accepted, does not go to another relay.
//
// A relay that has failed is tried last for 30 seconds. After that, one message tries it first. The pause doubles with each further
// failure, up to 10 minutes, and ends with the first success.
type Failover struct {
	relays []*standby // in the order of preference

	mu sync.Mutex // guards the state of relays; not held while a Client is called
}

// standby is a relay of a Failover. The Failover's lock guards all fields but client.
type standby struct {
	client   *Client
	failures int       // consecutive failures
	failed   time.Time // when the relay failed last
	rests    time.Time // the relay is tried last until this time
	trying   bool      // after the pause, a Send is trying whether the relay works
}

const (
	restFirst = 30 * time.Second
	restMost  = 10 * time.Minute
	patience  = 5 * time.Second // a Send whose context ended after waiting this long for a connection counts as a failure
)

// NewFailover returns a Failover over clients, the preferred one first. Without clients every Send fails. The Failover does not
// own the Clients, but Shutdown shuts them down.
func NewFailover(clients ...*Client) *Failover {
	f := &Failover{}
	for _, c := range clients {
		f.relays = append(f.relays, &standby{client: c})
	}
	return f
}

// Send sends m as [Client.Send] does, through the first relay that works. For all relays but the last, Send sets
// Message.FailFast, so that it does not wait for a relay that cannot be reached. Receipt and error are those of the last relay
// that was tried. A message whose Body can be read only once is not sent to another relay after reading has begun.
func (f *Failover) Send(ctx context.Context, m Message) (Receipt, error) {
	used := func() bool { return false }
	if r, ok := m.Body.(io.Reader); ok && body.Once(body.Again(m.Body)) {
		watched := &watchedBody{Reader: r, body: m.Body}
		m.Body, used = watched, watched.begun.Load
	}
	receipt, err := Receipt{}, errNoRelays()
	failFast, relays := m.FailFast, f.order()
	for i, relay := range relays {
		m.FailFast = failFast || i < len(relays)-1 // wait only for the last relay
		began, accepted := time.Now(), relay.client.Stats().Accepted
		receipt, err = relay.client.Send(ctx, m)
		if failed := f.note(ctx, relay, began, accepted, err); !failed || ctx.Err() != nil || used() {
			break
		}
	}
	return receipt, err
}

// SendMail sends msg to all recipients in to or to none, as [Client.SendMail] does.
func (f *Failover) SendMail(from string, to []string, msg []byte) error {
	_, err := f.Send(context.Background(), Message{From: from, To: to, Body: Bytes(msg), AllOrNothing: true})
	return err
}

// Ping calls [Client.Ping] for all relays at the same time. It returns nil as soon as one Ping succeeds, else the joined errors
// of all.
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

// Shutdown shuts down all Clients at the same time, as [Client.Shutdown] does.
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

// order returns the relays in the order in which a Send that begins now tries them. Relays that pause after a failure come last,
// as do relays that another Send is trying after their pause.
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
		case len(ready) == 0: // this Send tries the relay first
			relay.trying = true
			ready = append(ready, relay)
		default:
			resting = append(resting, relay)
		}
	}
	slices.SortStableFunc(resting, func(a, b *standby) int { return a.rests.Compare(b.rests) })
	return append(ready, resting...)
}

// note records the result of a Send through relay, and reports whether the relay has failed. The Send began at began, when
// accepted messages had been accepted.
func (f *Failover) note(ctx context.Context, relay *standby, began time.Time, accepted int64, err error) (failed bool) {
	e, _ := errors.AsType[*Error](err)
	switch {
	case e == nil || e.Outcome != NotAccepted:
	case ctx.Err() != nil: // not the relay's fault, unless it accepted nothing while this Send waited for patience without a connection
		failed = e.Op == OpWait && time.Since(began) >= patience && relay.client.Stats().Accepted == accepted
	default:
		failed = e.Scope == ScopeRelay && e.Op != OpConfig
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch now := time.Now(); {
	case failed:
		if began.Before(relay.failed) {
			break // another Send has reported this failure
		}
		relay.failed, relay.trying = now, false
		relay.failures++
		relay.rests = now.Add(min(restFirst<<min(relay.failures-1, 10), restMost))
	case e == nil, e.Reply.Code != 0:
		relay.failures, relay.trying = 0, false // the relay has replied to the message
	default:
		relay.trying = false // the Send says nothing about the relay
	}
	return failed
}

// watchedBody is a one-shot body that records whether reading has begun.
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
