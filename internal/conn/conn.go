// Package conn is one SMTP connection, from its first byte to the relay's close: opening it, transactions that may overlap, and its
// end. It knows no pool and no retries, and does not judge: a transaction ends in a [Result].
package conn

import (
	"bufio"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smtprelay/smtprelay/internal/scrub"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// Conn is one connection, from its first byte to the relay's close.
//
// The Owner lends its write side to one transaction at a time. The read loop runs as long as the connection and hands each reply to the
// oldest command without one: replies are matched by their order alone. A writer appends the exchange before it writes the command.
type Conn struct {
	o       *Options
	trace   Trace
	owner   Owner
	raw     *progressConn
	conn    net.Conn             // raw, or TLS on it
	tls     *tls.ConnectionState // nil in the clear
	addr    string               // of the relay, IP and port, where it offers chunks
	ext     wire.Extensions      // of the last EHLO
	born    time.Time
	hello   string    // the EHLO command
	expires time.Time // when it is too old to be used; zero means never
	limit   int       // transactions; 0 means any number
	chunked bool      // bodies may go in chunks (RFC 3030)

	replies *wire.ReplyReader // owned by the read loop
	said    scrub.Stream      // removes from replies what they repeat of the credentials

	out         *bufio.Writer     // owned by the holder of the write side, as are the fields down to inStep
	body        wire.BodyWriter   // on out
	line        []byte            // scratch
	pendingAuth []byte            // an AUTH command that the first transaction will send
	authMark    [sha256.Size]byte // of the credentials that were given last, or are to be given
	stall       *time.Timer       // runs while a transaction waits behind an unanswered final dot
	inStep      bool              // the relay has answered an envelope in full, so a chunk may leave together with its envelope

	sent      chan struct{} // buffered, size 1: SendAway is done
	doomed    atomic.Bool   // phase is draining or later
	abandoned atomic.Bool   // set by whichever of sendOff and SendAway ends first
	lost      chan struct{} // closed when phase is draining
	done      chan struct{} // closed when no reply will be read any more

	mu         sync.Mutex // guards the fields below; never held across I/O
	phase      phase
	ending     ending
	waiting    exchanges
	written    int64     // octets written to the network; only the holder of the write side changes it, and reads it without mu
	attempted  int64     // written, plus the octets of a write in progress
	wrote      sync.Cond // on mu: no write is in progress
	answered   int64     // the position behind the last command that has a reply
	crowded    bool      // more is written behind that than the window of every relay holds
	pending    int       // final replies outstanding
	used       int       // transactions begun
	failed     int       // transactions in a row that failed
	open       bool      // the relay may have an envelope open: the next transaction starts with RSET
	unended    bool      // the last transaction did not reach its end
	quitting   bool      // QUIT was written
	writeErr   error     // what a write failed with
	closeBy    time.Time // the end of reading; zero means none
	heard      time.Time // when the last reply arrived
	moved      time.Time // when the last large write finished
	deadline   time.Time // the read deadline in force
	decided    bool      // the relay has accepted a message, or has refused one for what it is
	overlapped bool      // the relay has answered in full an envelope that left in one write with the end of the message before it

	onLost func(cause error) // called with mu held when phase becomes draining; may be nil
}

// ending is how a connection ended, as far as it has. Each field is set once.
type ending struct {
	reason    Reason     // why phase is not ready
	cause     error      // why it is draining
	fault     error      // a reply to one message because of which no other begins
	said421   bool       // the relay has replied 421 to a command
	left421   bool       // and then closed the connection in order, so that no reply is missing
	outOfStep bool       // a reply was not possible for its command, so later replies cannot be matched
	killed    bool       // by Kill: the relay's close is not waited for
	ledByAuth bool       // the first transaction began with AUTH, and failed for that
	auth      wire.Reply // the refusal of that AUTH
}

// phase is where a connection is in its life. It never goes back.
type phase int

const (
	ready    phase = iota // a transaction may be begun, now or later
	last                  // no further transaction is begun: QUIT is due behind those that are under way
	draining              // nothing more is written; final replies that are outstanding are awaited
	closing               // nothing more is read: the relay's close is awaited
)

// Reason tells why a connection takes no further transaction.
type Reason string

const (
	Full   Reason = "full"
	Age    Reason = "age"
	Idle   Reason = "idle"
	Closed Reason = "closed"
	Fault  Reason = "fault"
	Shared Reason = "shared"
)

// Status is what may be done with a Conn whose write side nobody holds.
type Status int

const (
	Free         Status = iota // a transaction may begin
	Overlappable               // one may begin behind the final dot of the one before
	Busy                       // none may begin before a final reply is in
	Retired                    // none may begin any more: say QUIT
	Lost                       // none may begin any more, and there is nothing to do
)

// Info describes a Conn.
type Info struct {
	Used      int        // transactions begun
	Pending   int        // of these, final replies outstanding
	Reason    Reason     // why no further one is begun; "" while one may be
	Err       error      // the fault that Reason tells of
	Decided   bool       // the relay has accepted a message, or has refused one for what it is: it does its work
	LedByAuth bool       // AUTH led its first transaction, and that came to nothing
	Auth      wire.Reply // the refusal of the AUTH that led the first transaction
	Killed    bool       // by Kill: the relay's close was not waited for
}

// Info returns how the connection is now.
func (c *Conn) Info() Info {
	c.mu.Lock()
	defer c.mu.Unlock()
	info := Info{Used: c.used, Pending: c.pending, Reason: c.ending.reason, Auth: c.ending.auth, Decided: c.decided, LedByAuth: c.ending.ledByAuth, Killed: c.ending.killed}
	if c.ending.reason == Fault {
		if info.Err = c.ending.fault; info.Err == nil {
			info.Err = c.ending.cause
		}
	}
	return info
}

// Extensions is what the relay has offered. It does not change.
func (c *Conn) Extensions() *wire.Extensions { return &c.ext }

// TLS is the state of TLS; nil in the clear. It does not change.
func (c *Conn) TLS() *tls.ConnectionState { return c.tls }

// Born is when the connection was opened.
func (c *Conn) Born() time.Time { return c.born }

// Expires is when the connection is too old to be used; zero means never. It does not change after Bound.
func (c *Conn) Expires() time.Time { return c.expires }

// Limit is how many transactions may be begun; 0 means any number. It does not change after Bound.
func (c *Conn) Limit() int { return c.limit }

// Bound sets how many transactions may be begun, 0 for any number, and until when, zero for any time. It is called before
// the first transaction.
func (c *Conn) Bound(transactions int, expires time.Time) {
	c.limit, c.expires = transactions, expires
}

// Buffered reports whether something was written that has not left: another transaction's final dot. It is for the holder of
// the write side.
func (c *Conn) Buffered() bool { return c.out.Buffered() > 0 }

// PendingAuth reports whether AUTH is still to be sent. It is for the holder of the write side.
func (c *Conn) PendingAuth() bool { return c.pendingAuth != nil }

// InterruptWrites ends a write that is under way and every later one.
func (c *Conn) InterruptWrites() { c.raw.interrupt() }

// Status returns what may be done with the connection, and retires it if it is too old. One without a message yet is not retired by
// age: opening it may have taken that long, and the next one would take as long.
func (c *Conn) Status(now time.Time) Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.used > 0 && !c.expires.IsZero() && !now.Before(c.expires) {
		c.retireLocked(Age)
	}
	switch {
	case c.phase >= draining, c.writeErr != nil:
		return Lost
	case c.phase == last && c.pending > 0:
		return Busy
	case c.phase == last:
		return Retired
	case c.pending == 0:
		return Free
	case c.overlaps() && c.pending < c.inFlightLocked():
		return Overlappable
	}
	return Busy
}

// pipelining reports whether commands may be written without awaiting the reply to the one before.
func (c *Conn) pipelining() bool {
	return c.o.Pipelining && c.ext.Has("PIPELINING")
}

// overlaps reports whether commands may be written behind a final dot.
func (c *Conn) overlaps() bool {
	return c.o.Overlap && c.pipelining() && c.o.Profile.Overlaps()
}

// inFlightLocked is how many messages may be without final reply. With DATA it is two: the body of the second waits for a 354, which
// comes after the first one's final reply. In chunks it is MaxInFlight, once the relay has shown on this connection that it answers
// an envelope that leaves together with the end of a message.
func (c *Conn) inFlightLocked() int {
	switch {
	case !c.chunked:
		return 2
	case !c.overlapped:
		return min(2, c.o.MaxInFlight)
	}
	return c.o.MaxInFlight
}

// Usable reports whether the connection may take another transaction, now or later.
func (c *Conn) Usable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.phase == ready && (c.limit == 0 || c.used < c.limit)
}

// LastRoom is how many more transactions a connection may take that is in the last fifth of its limit. It is 0 for any other
// connection, and for one on which no reply arrived since.
func (c *Conn) LastRoom(since time.Time) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	left := c.limit - c.used
	if c.phase != ready || c.limit == 0 || left > c.limit/5 || c.heard.Before(since) {
		return 0
	}
	return left
}

// Failed reports whether the connection was lost or will end early.
func (c *Conn) Failed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ending.reason == Fault
}

// Moved is when the last reply arrived or the last large write finished.
func (c *Conn) Moved() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return later(c.heard, c.moved)
}

// Retire makes the connection take no further transaction.
func (c *Conn) Retire(why Reason) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.retireLocked(why)
}

func (c *Conn) retireLocked(why Reason) {
	if c.phase == ready {
		c.phase, c.ending.reason = last, why
	}
}

// retireFaultLocked makes the connection take no further transaction because of the reply that err tells.
func (c *Conn) retireFaultLocked(err error) {
	if c.phase == ready {
		c.retireLocked(Fault)
		c.ending.fault = err
	}
}

// Ending.

// fail ends the use of the connection because of err. It may be called from any goroutine and more than once; the first cause counts.
// Final replies that are outstanding are still read.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failLocked(err)
	c.armLocked()
}

func (c *Conn) failLocked(err error) {
	if c.phase >= draining {
		return
	}
	if err == nil {
		err = errors.New("session ended")
	}
	c.ending.cause = err
	c.retireLocked(Fault)
	c.phase = draining
	c.doomed.Store(true)
	close(c.lost)
	if c.onLost != nil {
		c.onLost(err)
	}
}

// onLoss sets the function that is called, with c.mu held, when the connection is lost; nil means none. It returns false if the
// connection is lost already.
func (c *Conn) onLoss(f func(cause error)) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.onLost = f
	return c.phase < draining
}

// stepLostLocked ends the connection because of a reply that is not possible for its command. No final reply is read any more: it
// would be matched with the wrong message.
func (c *Conn) stepLostLocked(err error) {
	c.ending.outOfStep = true
	c.failLocked(err)
}

// Kill ends the connection at once and waits for nothing.
func (c *Conn) Kill(err error) {
	c.mu.Lock()
	c.failLocked(err)
	c.ending.killed = true
	c.closeBy = longAgo
	c.armLocked()
	c.mu.Unlock()
	c.raw.abandon() // after failLocked, so that failed reads and writes are not taken for the cause
}

// lastWords is how long we read, after a failed write, for a reply that says why.
const lastWords = 2 * time.Second

// writeFailed records a failed write. The relay's last reply tells more than "broken pipe", so reading goes on for lastWords.
func (c *Conn) writeFailed(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writeErr == nil {
		c.writeErr = err
	}
	switch {
	case c.ending.cause != nil: // the write was interrupted
	case IsTimeout(err):
		c.failLocked(err) // the relay stalls; it has not closed
	default:
		c.hurryLocked(lastWords)
	}
	c.armLocked()
}
