package outbox

import (
	"context"
	"errors"
	"io"
	"iter"
	"time"

	"github.com/smtprelay/smtprelay"
)

// Store keeps the messages of an [Outbox]. Package storetest has the tests that one must pass. All methods are safe for
// concurrent use; calls that run at the same time should become durable together.
type Store interface {
	// Put adds messages. A nil error means that the message is durable, or that its ID was there already.
	Put(ctx context.Context, entries []Entry) []error

	// Attach makes the caller a worker of the store, until it calls detach. ErrWorking means that there is a worker, and that the
	// store allows only one. Messages that a dead worker was sending become Unknown; parked is how many did so far.
	Attach(ctx context.Context) (detach func() error, parked int, err error)

	// Claim returns up to n messages that are due at now and that nobody has claimed, and when the next one is due, zero if none
	// is. Tenants take turns, weight(tenant) messages in each; of a tenant's messages, the highest Priority goes first, then the
	// oldest. A claim is not durable: it ends with End or Release, or with the worker.
	Claim(ctx context.Context, now time.Time, n int, weight func(tenant string) int) (claims []Claim, next time.Time, err error)

	// Begin makes a message Sending, durably. It is compare-and-set: [ErrConflict] means that the message is no longer Queued; a
	// message that is Sending with the same Nonce is no conflict.
	Begin(ctx context.Context, intents []Intent) []error

	// End records the outcome of a claimed message, durably, and ends the claim. It is compare-and-set like Begin: the message is
	// Queued, or Sending with the same Nonce.
	End(ctx context.Context, ends []End) []error

	// Release ends claims on messages whose delivery has not begun.
	Release(ids ...string)

	// Get returns a message; [ErrNotFound] if there is none.
	Get(ctx context.Context, id string) (Item, error)

	// Body returns the body of a message. [ErrNotFound] means that there is no such message, or that its body is gone, as it is
	// after the message was accepted.
	Body(ctx context.Context, id string) (io.WriterTo, error)

	// List yields the messages in a state, oldest first. It holds few of them in memory, and no lock while it yields.
	List(ctx context.Context, state State) iter.Seq2[Item, error]

	// Count returns the [Counts] of the store.
	Count(ctx context.Context) (Counts, error)

	// Change calls f with a message and stores what f has changed, durably. If f returns an error, Change stores nothing and
	// returns that error. No other change of the message happens in between.
	Change(ctx context.Context, id string, f func(*Item) error) error

	// Forget removes messages that became Accepted or Cancelled before that time, some thousand at most, and returns how many.
	Forget(ctx context.Context, before time.Time) (int, error)

	Close() error
}

// Counts has the number of messages of a [Store] in each state, of all processes together.
type Counts struct {
	Queued, Sending, Dead, Unknown int

	// Oldest is when, of the Queued messages that are due, the first that was enqueued was due; zero if none is due. It is some
	// seconds ago if all is well.
	Oldest time.Time
}

// Newser is an optional interface of a [Store]: News returns a channel that has a value when messages may be due that others have
// enqueued. Without it they are found within a second.
type Newser interface{ News() <-chan struct{} }

// Entry is a message to put into a Store.
type Entry struct {
	Item
	Body io.WriterTo
}

// Claim is a message that a worker has in hand.
type Claim struct {
	Item
	Nonce string      // of this delivery; no other delivery has the same
	Body  io.WriterTo // can be written any number of times, until the claim ends
}

// Intent says that a message may have been sent from now on.
type Intent struct{ ID, Nonce string }

// End is the outcome of a delivery.
type End struct {
	Nonce string
	Item
}

var (
	// ErrConflict is returned if a message is not in the expected state.
	ErrConflict = errors.New("outbox: the message is in another state")
	// ErrNotFound is returned if there is no message with the ID.
	ErrNotFound = errors.New("outbox: no such message")
	// ErrWorking is returned by Run if the store already has a worker, and allows only one.
	ErrWorking = errors.New("outbox: another worker has the store")
)

// State is the state of a message.
type State int

const (
	Queued    State = iota // it waits for its turn or its time; Attempts tells whether it was tried
	Sending                // the relay may have it: its end may be sent from now on
	Accepted               // all recipients were accepted
	Dead                   // the relay has refused it, or some of its recipients, permanently; or its time has passed
	Unknown                // the relay may have it or not: it is not sent again unless Resolve says so
	Cancelled              // by Cancel, or Resolve with Drop
)

var states = []string{"queued", "sending", "accepted", "dead", "unknown", "cancelled"}

// String returns the state in lower case.
func (s State) String() string {
	if s < 0 || int(s) >= len(states) {
		return "?"
	}
	return states[s]
}

// Item is a message with its state, without its body.
type Item struct {
	ID           string
	Tenant       string
	Priority     int
	From         string
	To           []string // who have yet to get it
	AllOrNothing bool
	MailOptions  *smtprelay.MailOptions
	RcptOptions  map[string]*smtprelay.RcptOptions

	Created, NotBefore, NotAfter time.Time

	State    State
	Due      time.Time // Queued: when it is tried next
	Changed  time.Time // when it entered this state
	Attempts int       // that came to an end
	Fates    []Fate    // of the recipients that were tried, by the relay's last replies
	Reason   string    // why it was not accepted, in one line, with the relay's words in quotes
}

// Fate is the outcome of a message for one recipient.
type Fate struct {
	To      string
	Outcome smtprelay.Outcome
	Code    int    // of the relay's reply; 0: none
	Reply   string // its words, on one line of printable characters
	QueueID string // the relay's
}
