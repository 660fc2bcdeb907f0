// Package conn is one SMTP connection, from its first byte to the relay's close: its opening, its transactions, which may
// overlap, and its end. It knows no pool and no retry, and judges nothing: a transaction ends in a [Result].
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
// Its write side belongs to whoever took it from its Owner, one at a time. Its read loop runs as long as the connection and
// hands each reply to the oldest exchange outstanding, by counting only. Who writes a command appends its exchange first.
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
	said    scrub.Stream      // what they repeat of the credentials is taken out

	out         *bufio.Writer     // owned by the holder of the write side, as are the fields down to inStep
	body        wire.BodyWriter   // on out
	line        []byte            // scratch
	pendingAuth []byte            // an AUTH command that is still to be sent, in front of the first transaction
	authMark    [sha256.Size]byte // of the credentials in it
	stall       *time.Timer       // while a transaction waits behind a final dot that has no reply
	inStep      bool              // the relay has answered an envelope in step, so a chunk may leave with its envelope

	sent      chan struct{} // has room for one; told by SendAway
	abandoned atomic.Bool   // SendAway, or the owner who waits for it, goes on alone: whoever sets it is first
	lost      chan struct{} // closed when phase is draining
	done      chan struct{} // closed when no reply will be read any more

	mu         sync.Mutex // guards the fields below; never held across I/O
	phase      phase
	ending     ending
	waiting    exchanges
	written    int64     // octets that were handed to the connection; changed by the holder of the write side, who alone reads it without mu
	attempted  int64     // the same, and those that are just being written
	wrote      sync.Cond // on mu: attempted is written again
	pending    int       // final replies outstanding
	used       int       // transactions begun
	failed     int       // transactions that came to nothing, in a row
	open       bool      // the relay may have a transaction open: RSET leads the next
	unended    bool      // the last one was given up before its end
	quitting   bool      // QUIT was written
	writeErr   error     // what a write failed with
	closeBy    time.Time // when the relay's last words must be in
	heard      time.Time // when the relay last answered
	moved      time.Time // when a large write was last through
	deadline   time.Time // the read deadline in force
	decided    bool      // the relay has accepted a message, or has refused one for what it is
	overlapped bool      // the relay has answered, in full, an envelope that left in one write with the end before it

	onLost func(cause error) // called when phase becomes draining; nil: nobody asks
}

// ending is how a connection came to take no further transaction, as far as it has. What is set stays as it is.
type ending struct {
	reason    Reason     // why phase is not ready
	cause     error      // why it is draining
	said421   bool       // the relay has, to a command
	left421   bool       // and has closed the connection in order: nothing that it said is missing
	outOfStep bool       // a reply cannot be that to its command, so those behind it are to others too
	killed    bool       // the relay is not waited for
	ledByAuth bool       // AUTH led the first transaction, and that came to nothing
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

// Status is what an Owner wants to know of a Conn whose write side nobody holds.
type Status int

const (
	Free         Status = iota // a transaction may be begun
	Overlappable               // one may be begun behind the final dot of the one before
	Busy                       // none may be begun until a final reply is in
	Retired                    // none may be begun any more: QUIT is due
	Lost                       // none may be begun any more, and nothing is to be done
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
	Killed    bool       // the relay was not waited for
}

// Info returns how the connection is now.
func (c *Conn) Info() Info {
	c.mu.Lock()
	defer c.mu.Unlock()
	info := Info{Used: c.used, Pending: c.pending, Reason: c.ending.reason, Auth: c.ending.auth, Decided: c.decided, LedByAuth: c.ending.ledByAuth, Killed: c.ending.killed}
	if c.ending.reason == Fault {
		info.Err = c.ending.cause
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

// Status returns what may be done with the connection. One whose time has come is retired by that, but for one that has not
// had a message yet: it may have taken that long to get ready, and the next one would too.
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

// inFlightLocked is how many messages may be on their way whose final reply is not in. With DATA it is two: the next one's
// body waits for a 354 that comes behind that reply. In chunks it is MaxInFlight, once the relay has shown on this connection
// that it answers what leaves together with the end of a message.
func (c *Conn) inFlightLocked() int {
	switch {
	case !c.chunked:
		return 2
	case !c.overlapped:
		return min(2, c.o.MaxInFlight)
	}
	return c.o.MaxInFlight
}

// Usable reports whether transactions may be begun yet, now or later.
func (c *Conn) Usable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.phase == ready && (c.limit == 0 || c.used < c.limit)
}

// LastRoom is how many more transactions may be begun on a connection that is in the last fifth of its life; 0 on another, and
// on one that was not heard of since.
func (c *Conn) LastRoom(since time.Time) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	left := c.limit - c.used
	if c.phase != ready || c.limit == 0 || left > c.limit/5 || c.heard.Before(since) {
		return 0
	}
	return left
}

// Failed reports whether the connection ends early, once the messages that are on their way have come to their end.
func (c *Conn) Failed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ending.reason == Fault
}

// Moved is when the relay was last heard of, or took something.
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

// Ending.

// fail ends the use of the connection because of err. It may be called from anywhere, any number of times; the first cause
// counts. Final replies that are outstanding are still awaited.
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
	close(c.lost)
	if c.onLost != nil {
		c.onLost(err)
	}
}

// onLoss has f called when the connection is lost, with c.mu held, or nothing if it is nil. It reports false if that has happened.
func (c *Conn) onLoss(f func(cause error)) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.onLost = f
	return c.phase < draining
}

// stepLostLocked ends the connection because of a reply that cannot be that to its command. No final reply is awaited any
// more: what comes would be taken for the reply to another message.
func (c *Conn) stepLostLocked(err error) {
	c.ending.outOfStep = true
	c.failLocked(err)
}

// Kill ends the connection now, awaiting nothing.
func (c *Conn) Kill(err error) {
	c.mu.Lock()
	c.failLocked(err)
	c.ending.killed = true
	c.closeBy = longAgo
	c.armLocked()
	c.mu.Unlock()
	c.raw.abandon() // second, so that the end of reading and writing is known to be a consequence
}

// lastWords is how long the relay may take to say why it does not take what is written.
const lastWords = 2 * time.Second

// writeFailed notes that a write has failed. The relay's last reply tells more than "broken pipe", so there is a short time
// for it to be read.
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
