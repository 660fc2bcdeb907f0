// Package conn implements one SMTP connection: opening it, running transactions that may overlap, and closing it. The package knows
// nothing about pools or retries and does not decide outcomes: a transaction returns a [Result].
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

// Conn is one SMTP connection, from the first byte to the relay's close.
//
// The Owner lends the write side to one transaction at a time. The read loop runs for the life of the connection and matches
// each reply with the oldest unanswered command: only the order matches replies to commands. A writer appends the exchange
// before it writes the command.
type Conn struct {
	o       *Options
	trace   Trace
	owner   Owner
	raw     *progressConn
	conn    net.Conn             // raw, or TLS over raw
	tls     *tls.ConnectionState // nil without TLS
	addr    string               // the relay's IP and port; set only if the relay offers CHUNKING
	ext     wire.Extensions      // from the last EHLO
	born    time.Time
	hello   string    // the EHLO command
	expires time.Time // no transaction begins after this; zero means no limit
	limit   int       // maximum number of transactions; 0 means no limit
	chunked bool      // bodies may be sent in chunks (RFC 3030)

	replies *wire.ReplyReader // owned by the read loop
	said    scrub.Stream      // removes credentials that a reply repeats

	out         *bufio.Writer     // owned by the holder of the write side, as are the fields down to inStep
	body        wire.BodyWriter   // writes to out
	line        []byte            // scratch
	pendingAuth []byte            // an AUTH command that the first transaction will send
	authMark    [sha256.Size]byte // hash of the credentials sent last, or in pendingAuth
	inStep      bool              // the relay has answered every command of an envelope, so a chunk may be sent together with its envelope

	sent      chan struct{} // buffered, size 1: SendAway has finished
	doomed    atomic.Bool   // phase is draining or later
	abandoned atomic.Bool   // set by sendOff or SendAway, whichever ends first
	lost      chan struct{} // closed when phase becomes draining
	done      chan struct{} // closed when no further reply will be read

	mu         sync.Mutex // guards the fields below; never held across I/O
	phase      phase
	ending     ending
	waiting    exchanges
	written    int64     // octets written to the network; changed only by the holder of the write side, who may read it without mu
	attempted  int64     // written, plus the octets of a write in progress
	wrote      sync.Cond // on mu: no write is in progress
	answered   int64     // position after the last command that has a reply
	crowded    bool      // more than leastWindow octets follow answered
	pending    int       // final replies outstanding
	used       int       // transactions begun
	failed     int       // consecutive failed transactions
	open       bool      // the relay may have an envelope open: the next transaction starts with RSET
	unended    bool      // the last transaction did not reach its end
	quitting   bool      // QUIT was written
	writeErr   error     // error of the first failed write
	closeBy    time.Time // reading stops at this time; zero means no limit
	heard      time.Time // when the last reply arrived
	moved      time.Time // when the last large write finished
	deadline   time.Time // the read deadline in force
	decided    bool      // the relay has accepted or refused a message on its merits; see decides
	overlapped bool      // the relay has answered every command of an envelope that was sent in one write with the previous message's end

	onLost func(cause error) // called with mu held when phase becomes draining; may be nil
}

// ending records why and how a connection ended. Each field is set at most once.
type ending struct {
	reason    Reason     // why phase is not ready
	cause     error      // why phase is draining or later
	fault     error      // the reply to a message after which no further transaction may begin
	said421   bool       // the relay has replied 421 to a command
	left421   bool       // and then closed the connection with FIN, so no reply is missing
	outOfStep bool       // a reply was impossible for its command, so later replies cannot be matched
	killed    bool       // Kill was called: do not wait for the relay's close
	ledByAuth bool       // the first transaction began with AUTH, and failed because of it
	auth      wire.Reply // the refusal of that AUTH
}

// phase is the stage of a connection's life. It only increases.
type phase int

const (
	ready    phase = iota // a transaction may begin, now or later
	last                  // no further transaction begins; QUIT follows those in flight
	draining              // nothing more is written; outstanding final replies are still read
	closing               // nothing more is read; waiting for the relay's close
)

// Reason is why a connection takes no further transaction.
type Reason string

const (
	Full   Reason = "full"
	Age    Reason = "age"
	Idle   Reason = "idle"
	Closed Reason = "closed"
	Fault  Reason = "fault"
	Shared Reason = "shared"
)

// Status says what may be done with a Conn whose write side is free.
type Status int

const (
	Free         Status = iota // a transaction may begin
	Overlappable               // a transaction may begin after the unanswered final dot of the previous one
	Busy                       // no transaction may begin before a final reply arrives
	Retired                    // no further transaction may begin: send QUIT
	Lost                       // no further transaction may begin, and QUIT cannot be sent
)

// Info describes a Conn.
type Info struct {
	Used      int        // transactions begun
	Pending   int        // final replies outstanding
	Reason    Reason     // why no further transaction may begin; "" while one may
	Err       error      // the error, if Reason is Fault
	Decided   bool       // the relay has accepted or refused a message on its merits, so it works
	LedByAuth bool       // AUTH led the first transaction, which failed because of it
	Auth      wire.Reply // the refusal of the AUTH that led the first transaction
	Killed    bool       // Kill was called: the connection did not wait for the relay's close
}

// Info returns the connection's current state.
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

// Extensions returns what the relay offered in EHLO. It does not change.
func (c *Conn) Extensions() *wire.Extensions { return &c.ext }

// TLS returns the TLS state; nil without TLS. It does not change.
func (c *Conn) TLS() *tls.ConnectionState { return c.tls }

// Born returns when the connection was opened.
func (c *Conn) Born() time.Time { return c.born }

// Expires returns the time after which no transaction begins; zero means no limit. It does not change after Bound.
func (c *Conn) Expires() time.Time { return c.expires }

// Limit returns the maximum number of transactions; 0 means no limit. It does not change after Bound.
func (c *Conn) Limit() int { return c.limit }

// Bound sets Limit and Expires. The caller calls it before the first transaction.
func (c *Conn) Bound(transactions int, expires time.Time) {
	c.limit, c.expires = transactions, expires
}

// Buffered reports whether the write buffer holds another transaction's final dot. Only the holder of the write side may call it.
func (c *Conn) Buffered() bool { return c.out.Buffered() > 0 }

// PendingAuth reports whether AUTH is still to be sent. Only the holder of the write side may call it.
func (c *Conn) PendingAuth() bool { return c.pendingAuth != nil }

// InterruptWrites makes a write in progress and every later write fail.
func (c *Conn) InterruptWrites() { c.raw.interrupt() }

// Status returns what may be done with the connection, and retires it if it has expired. A connection without a transaction does
// not expire: if opening takes longer than the maximum age, a new connection would be no better.
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

// pipelining reports whether a command may be written before the previous command has its reply.
func (c *Conn) pipelining() bool {
	return c.o.Pipelining && c.ext.Has("PIPELINING")
}

// overlaps reports whether commands may be written after a final dot.
func (c *Conn) overlaps() bool {
	return c.o.Overlap && c.pipelining() && c.o.Profile.Overlaps()
}

// inFlightLocked returns how many messages may wait for a final reply at once. With DATA it is two: the second body waits for a
// 354, which follows the first message's final reply. With chunks it is MaxInFlight, once the relay has answered on this
// connection an envelope that was sent together with the end of a message.
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

// LastRoom returns how many more transactions the connection may take, if it is in the last fifth of its limit and a reply has
// arrived after since. Otherwise LastRoom returns 0.
func (c *Conn) LastRoom(since time.Time) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	left := c.limit - c.used
	if c.phase != ready || c.limit == 0 || left > c.limit/5 || c.heard.Before(since) {
		return 0
	}
	return left
}

// Failed reports whether a fault ended the connection, or will end it early.
func (c *Conn) Failed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ending.reason == Fault
}

// Moved returns when the last reply arrived or the last large write finished, whichever is later.
func (c *Conn) Moved() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return later(c.heard, c.moved)
}

// Retire stops the connection from taking further transactions.
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

// retireFaultLocked retires the connection because of the reply in err.
func (c *Conn) retireFaultLocked(err error) {
	if c.phase == ready {
		c.retireLocked(Fault)
		c.ending.fault = err
	}
}

// Ending.

// fail ends the connection because of err. It may be called from any goroutine and more than once; the first cause is kept.
// Outstanding final replies are still read.
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

// onLoss sets the function that is called, with c.mu held, when the connection is lost; nil removes it. It returns false if the
// connection is already lost.
func (c *Conn) onLoss(f func(cause error)) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.onLost = f
	return c.phase < draining
}

// stepLostLocked ends the connection because of a reply that is impossible for its command. No further final reply is read: it
// could be matched with the wrong message.
func (c *Conn) stepLostLocked(err error) {
	c.ending.outOfStep = true
	c.failLocked(err)
}

// Kill ends the connection at once, without QUIT and without waiting for the relay's close.
func (c *Conn) Kill(err error) {
	c.mu.Lock()
	c.failLocked(err)
	c.ending.killed = true
	c.closeBy = longAgo
	c.armLocked()
	c.mu.Unlock()
	c.raw.abandon() // after failLocked, so that the failed reads and writes do not become the cause
}

// lastWords is how long to keep reading after a failed write, for a reply that says why.
const lastWords = 2 * time.Second

// writeFailed records a failed write. Reading continues for lastWords, because the relay's last reply says more than "broken pipe".
func (c *Conn) writeFailed(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writeErr == nil {
		c.writeErr = err
	}
	switch {
	case c.ending.cause != nil: // the write was interrupted
	case IsTimeout(err):
		c.failLocked(err) // the relay has stalled; it has not closed the connection
	default:
		c.hurryLocked(lastWords)
	}
	c.armLocked()
}
