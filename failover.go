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
// A message goes to the next relay only where the previous one has accepted it for nobody and it was the relay that failed
// ([ScopeRelay]): no connection could be opened, or it was lost or ended with 421 before the end of the message was sent. A message
// that the relay refused, or may have accepted, goes no further.
//
// A relay that has failed is tried last for 30 seconds. After that one message tries it again. The pause doubles with each further
// failure, up to 10 minutes, and ends with the first success.
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

// NewFailover returns a Failover over clients, the preferred one first. Without clients every Send fails. The Failover owns the Clients
// only in that Shutdown shuts them down.
func NewFailover(clients ...*Client) *Failover {
	f := &Failover{}
	for _, c := range clients {
		f.relays = append(f.relays, &standby{client: c})
	}
	return f
}

// Send sends m as [Client.Send] does, through the first relay that works. All but the last one are asked as with Message.FailFast: none
// of them is waited for while it cannot be reached. Receipt and error are those of the last relay that was tried.
// A message whose Body can be read only once goes no further once its Body was begun.
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

// SendMail sends msg to all of to or to nobody, as [Client.SendMail] does.
func (f *Failover) SendMail(from string, to []string, msg []byte) error {
	_, err := f.Send(context.Background(), Message{From: from, To: to, Body: Bytes(msg), AllOrNothing: true})
	return err
}

// Ping asks all relays at the same time, as [Client.Ping] does. It returns nil as soon as one has answered, else the errors of all,
// joined.
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
