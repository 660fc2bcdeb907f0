// Package conn is one SMTP connection, from its first byte to the relay's close: its opening, its transactions, which may
// overlap, and its end. It knows no pool and no retry, and judges nothing: a transaction ends in a [Result].
package conn

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smtprelay/smtprelay/internal/scrub"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// exchange is a command whose reply is outstanding.
type exchange struct {
	op    Step
	final bool          // its reply decides over the message
	end   int64         // the position behind the octets that must leave for a reply to come
	tx    *Transaction  // told of the reply; nil for QUIT
	rcpt  int           // which recipient, for StepRcpt
	limit time.Duration // for the reply, counted from when no other is awaited before it and end has left; 0 means none
	first bool          // of what was written behind a final dot that had no reply yet
}

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
	ending    atomic.Bool   // phase is draining or later
	abandoned atomic.Bool   // SendAway, or the owner who waits for it, goes on alone: whoever sets it is first
	lost      chan struct{} // closed when phase is draining
	done      chan struct{} // closed when no reply will be read any more

	mu         sync.Mutex // guards the fields below; never held across I/O
	phase      phase
	reason     Reason     // why phase is not ready
	cause      error      // why it is draining
	waiting    []exchange // oldest first, from head on
	head       int
	written    int64      // octets that were handed to the connection; changed by the holder of the write side, who alone reads it without mu
	attempted  int64      // the same, and those that are just being written
	wrote      sync.Cond  // on mu: attempted is written again
	answered   int64      // the position behind the last command that has a reply
	crowded    bool       // so much is behind that that the relay's window may be full
	pending    int        // final replies outstanding
	used       int        // transactions begun
	failed     int        // transactions that came to nothing, in a row
	open       bool       // the relay may have a transaction open: RSET leads the next
	unended    bool       // the last one was given up before its end
	quitting   bool       // QUIT was written
	writeErr   error      // what a write failed with
	closeBy    time.Time  // when the relay's last words must be in
	heard      time.Time  // when the relay last answered
	moved      time.Time  // when a large write was last through
	deadline   time.Time  // the read deadline in force
	said421    bool       // the relay has, to a command
	left421    bool       // and has closed the connection in order: nothing that it said is missing
	auth       wire.Reply // the refusal of pendingAuth
	outOfStep  bool       // a reply cannot be that to its command, so those behind it are to others too
	abort      bool       // killed: the relay is not waited for
	ledByAuth  bool       // AUTH led its first transaction, and that came to nothing
	decided    bool       // the relay has accepted a message, or has refused one for what it is
	overlapped bool       // the relay has answered, in full, an envelope that left in one write with the end before it
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
}

// Info returns how the connection is now.
func (c *Conn) Info() Info {
	c.mu.Lock()
	defer c.mu.Unlock()
	info := Info{Used: c.used, Pending: c.pending, Reason: c.reason, Auth: c.auth, Decided: c.decided, LedByAuth: c.ledByAuth}
	if c.reason == Fault {
		info.Err = c.cause
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
	return c.reason == Fault
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
		c.phase, c.reason = last, why
	}
}

// Reading.

// ReadLoop runs until the connection has ended. It alone reads.
func (c *Conn) ReadLoop() {
	var err error
	for more := true; more; {
		var r wire.Reply
		if r, _, err = c.readReply(false); err != nil {
			break
		}
		more = c.deliver(r)
	}
	c.mu.Lock()
	c.failLocked(c.lossLocked(err))
	c.mu.Unlock()
	c.raw.interrupt()
	c.mu.Lock()
	for c.attempted != c.written { // until then nobody knows what has left
		c.wrote.Wait()
	}
	wait := c.o.Timeouts.Quit
	waited := c.quitting && (c.head == len(c.waiting) || c.waiting[c.head].op == StepQuit)
	switch {
	case c.abort:
		wait = 0
	case waited && c.writeErr == nil && isOver(err) && c.deadline != longAgo:
		wait -= c.o.Timeouts.untilFIN()
	}
	c.phase, c.left421 = closing, c.said421 && errors.Is(err, io.EOF)
	c.mu.Unlock()
	close(c.done)
	c.owner.Changed(false)

	// A clean end of TLS is not yet the close of the connection below.
	if _, onTLS := c.conn.(*tls.Conn); ClosedByPeer(err) && !onTLS {
		c.raw.Close()
	} else {
		c.raw.hangUp(wait)
	}
	c.owner.Closed()
}

// deliver gives r to the oldest exchange outstanding and reports whether there is more to read.
func (c *Conn) deliver(r wire.Reply) (more bool) {
	c.traceReply(r)
	c.mu.Lock()
	if c.earlyLocked(r) {
		c.failLocked(&UnexpectedReply{Reply: r})
		c.mu.Unlock()
		return false
	}
	c.heard = time.Now()
	x := c.waiting[c.head]
	c.waiting[c.head] = exchange{}
	c.head++
	if c.head == len(c.waiting) {
		c.waiting, c.head = c.waiting[:0], 0
	}
	c.answered = max(c.answered, x.end)
	c.boundUnackedLocked()
	c.learnLimit(x, r)
	c.decided = c.decided || decides(x, r)
	if r.Code == 421 && x.op != StepQuit {
		// The relay is leaving, whatever it may still say to what was sent already.
		c.said421 = true
		c.hurryLocked(c.o.Timeouts.Quit)
		c.failLocked(&ReplyError{Step: x.op, Reply: r})
	}
	if x.tx != nil {
		if x.final && r.Code == 421 && c.replies.HadYes() {
			x.tx.contradicted = true // the relay has begun to say yes, and was cut short by its own farewell
		}
		x.tx.replyLocked(x, r)
	} else if x.first && r.Code == 503 {
		c.o.Profile.OverlapFailed()
	}
	if x.op == StepQuit {
		// What is left is to see the relay's close.
		c.hurryLocked(c.o.Timeouts.untilFIN())
	}
	if x.final {
		c.pending--
	}
	if c.head == len(c.waiting) {
		c.peekLocked(x, r)
	}
	c.raw.hasten = c.isPartLocked(x)
	c.armLocked()
	stays := x.op == StepQuit && r.Class() != 2 // the relay, until it sees FIN
	more = !c.outOfStep && !stays && (c.phase < draining || c.dueLocked())
	c.mu.Unlock()
	if x.op == StepQuit && r.Class() == 2 {
		c.endTLS()
	}

	if x.final {
		if more {
			c.owner.Changed(true)
		}
		// After Changed, so that a sender who has another message at once finds this connection idle and opens no other.
		c.mu.Lock()
		x.tx.notified = true
		x.tx.wake()
		c.mu.Unlock()
	}
	return more
}

// isPartLocked reports whether the reply to x is a part of what the relay has to say to commands that it has: where it writes the next
// one on its own, that one waits for our acknowledgement. Of chunks only the replies to one message count, and to QUIT: others are on
// their way nearly always, and what we send acknowledges as well.
func (c *Conn) isPartLocked(x exchange) bool {
	if c.head == len(c.waiting) {
		return false
	}
	next := &c.waiting[c.head]
	return next.end <= c.attempted && (next.tx == x.tx || next.tx == nil || !c.chunked)
}

// decides reports whether r, the reply to x, tells what becomes of a message.
func decides(x exchange, r wire.Reply) bool {
	switch {
	case r.Code == 421 || r.Code == 432:
		return false
	case x.final:
		return true
	}
	return (x.op == StepRcpt || x.op == StepData) && r.Class() >= 4
}

// learnLimit takes in what r, the reply to x, tells of how many transactions the relay allows on a connection.
func (c *Conn) learnLimit(x exchange, r wire.Reply) {
	switch mail := x.op == StepMail; {
	case mail && r.Class() == 2:
		c.o.Profile.SessionGoesOn(x.tx.seq)
	case (mail || x.op == StepRset) && x.tx.seq > 1 && (r.Code == 421 || mail && c.o.Profile.EndsSession(x.op, r, x.tx.seq)):
		c.o.Profile.SessionFull(x.tx.seq-1, c.born)
	}
}

// peekLocked looks at what has come with r, the reply to x, where no other command waits for one.
func (c *Conn) peekLocked(x exchange, r wire.Reply) {
	switch next := c.replies.Peek(); {
	case next == 0:
	case x.final && next/100 != r.Class() && next != 421 && next != 221:
		x.tx.contradicted = true
	case !x.final && next < 400:
		c.failLocked(errExtraReply) // before anybody acts on replies that may be those to other commands
	}
}

// earlyLocked reports whether r comes before the command that it would answer has left. No relay can answer that, so r is
// one reply too many, and all replies behind it would be taken for those to other commands. A refusal is believed: a relay may
// refuse a message of which it has not read the end.
func (c *Conn) earlyLocked(r wire.Reply) bool {
	return c.head == len(c.waiting) || r.Class() < 4 && c.waiting[c.head].end > c.attempted
}

// errExtraReply ends a connection whose relay has sent more replies than it was given commands.
var errExtraReply = errors.New("the relay sent a reply too many")

// readReply reads a reply, long if it may carry data. From here on nobody sees what the relay repeats of the credentials, but for what was read raw.
func (c *Conn) readReply(long bool) (r wire.Reply, raw string, err error) {
	read := c.replies.ReadReply
	if long {
		read = c.replies.ReadLong
	}
	if r, err = read(); err != nil {
		if m, ok := errors.AsType[*wire.MalformedError](err); ok {
			err = &wire.MalformedError{Line: c.said.Scrub(m.Line)}
		}
		return r, "", err
	}
	raw = r.Text
	r.Text = c.said.Scrub(raw)
	return r, raw, nil
}

// traceReply tells of a reply before anybody acts on it.
func (c *Conn) traceReply(r wire.Reply) {
	if c.trace.Reply == nil {
		return
	}
	var x exchange
	ctx := context.Background()
	c.mu.Lock()
	if c.head < len(c.waiting) {
		if x = c.waiting[c.head]; x.tx != nil {
			ctx = x.tx.ctx
		}
	}
	c.mu.Unlock()
	if x.final {
		x.op = StepFinalDot // of chunks, too
	}
	c.trace.Reply(ctx, x.op, r)
}

// armLocked sets the read deadline to that of the oldest exchange outstanding.
func (c *Conn) armLocked() {
	if c.phase == closing {
		return
	}
	var at time.Time
	switch {
	case c.cause != nil && !c.dueLocked():
		at = longAgo
	case c.head < len(c.waiting):
		if x := c.waiting[c.head]; x.limit > 0 && x.end <= c.written {
			at = time.Now().Add(x.limit)
		}
	}
	if !c.closeBy.IsZero() && (at.IsZero() || c.closeBy.Before(at)) {
		at = c.closeBy
	}
	if at != c.deadline {
		c.deadline = at
		c.raw.SetReadDeadline(at)
	}
}

// dueLocked reports whether a connection that fails still has a final reply to come: not to a final dot that never left, or left
// in part.
func (c *Conn) dueLocked() bool {
	return slices.ContainsFunc(c.waiting[c.head:], func(x exchange) bool { return x.final && x.end <= c.attempted })
}

// hurryLocked bounds how long the relay is listened to from now on.
func (c *Conn) hurryLocked(d time.Duration) {
	if by := time.Now().Add(d); c.closeBy.IsZero() || by.Before(c.closeBy) {
		c.closeBy = by
	}
}

// lossLocked turns err, with which reading ended, into the reason why the connection is lost.
func (c *Conn) lossLocked(err error) error {
	if c.cause == nil && c.head < len(c.waiting) {
		if x := c.waiting[c.head]; x.tx != nil && x.tx.ledByAuth && x.op != StepRcpt && x.op != StepData {
			c.ledByAuth = true
			c.o.Profile.AuthFollowedFailed(wire.Reply{}) // the relay hangs up, or says nothing, where commands follow AUTH
		}
	}
	if c.writeErr != nil && (err == nil || IsTimeout(err) || ClosedByPeer(err)) {
		return c.writeErr // the cause, of which the end of reading is a consequence
	}
	if err == nil || c.head == len(c.waiting) {
		return err
	}
	x := c.waiting[c.head]
	if !isOver(err) {
		return err
	}
	if x.first && (c.cause == nil || time.Since(c.heard) >= tellingSilence) {
		// What stood behind the final dot was thrown away; see Profile.OverlapFailed.
		c.o.Profile.OverlapFailed()
	}
	return &TimeoutError{Step: x.op, After: x.limit}
}

// tellingSilence is how long there must be no reply to what stood behind a final dot, once that has its own, to conclude
// anything from it where the one who waited has given up. A caller may do so at any moment, whatever the relay is like.
const tellingSilence = time.Second

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
	c.cause = err
	c.retireLocked(Fault)
	c.phase = draining
	c.ending.Store(true)
	close(c.lost)
}

// stepLostLocked ends the connection because of a reply that cannot be that to its command. No final reply is awaited any
// more: what comes would be taken for the reply to another message.
func (c *Conn) stepLostLocked(err error) {
	c.outOfStep = true
	c.failLocked(err)
}

// Kill ends the connection now, awaiting nothing.
func (c *Conn) Kill(err error) {
	c.mu.Lock()
	c.failLocked(err)
	c.abort = true
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
	case c.cause != nil: // the write was interrupted
	case IsTimeout(err):
		c.failLocked(err) // the relay stalls; it has not closed
	default:
		c.hurryLocked(lastWords)
	}
	c.armLocked()
}

// Writing. All of it is for the holder of the write side.

// Write hands p to the connection; it is what out writes to. Once the connection is lost nothing leaves any more: that is
// what makes a final dot that was not sent by then a message that was not accepted.
func (c *Conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	if c.phase >= draining {
		c.mu.Unlock()
		return 0, c.cause
	}
	c.attempted = c.written + int64(len(p))
	c.boundUnackedLocked()
	c.mu.Unlock()
	n, err := c.conn.Write(p)
	c.mu.Lock()
	before := c.written
	c.written += int64(n)
	c.attempted = c.written
	if n >= outBuffer {
		c.moved = time.Now()
	}
	if c.head < len(c.waiting) && c.waiting[c.head].end > before {
		c.armLocked() // until now the limit was that of writing
	}
	c.wrote.Broadcast()
	c.mu.Unlock()
	if err != nil {
		c.writeFailed(err)
	}
	return n, err
}

// boundUnackedLocked bounds by Timeouts.Unacked how long the relay's kernel may acknowledge nothing, but not where the relay has more
// before it than its window may hold: Linux gives up one, too, that acknowledges and has no room for more, and the relay may
// think about the message before for minutes.
func (c *Conn) boundUnackedLocked() {
	limit := c.o.Timeouts.Unacked
	if crowded := c.attempted-c.answered > leastWindow; limit > 0 && crowded != c.crowded {
		if c.crowded = crowded; crowded {
			limit = 0
		}
		c.raw.setUnacked(limit)
	}
}

// leastWindow is how much fits into the window of any relay.
const leastWindow = 16 << 10

// position is the number of octets written so far, those in the buffer included.
func (c *Conn) position() int64 { return c.written + int64(c.out.Buffered()) }

// expect appends an exchange for the command that is written next. It fails if the connection is lost.
func (c *Conn) expect(x exchange) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause != nil {
		return false
	}
	c.waiting = append(c.waiting, x)
	switch {
	case x.final:
		c.pending++
		c.unended = false
	case x.tx != nil:
		x.tx.asked++
	}
	if len(c.waiting)-c.head == 1 {
		c.armLocked()
	}
	return true
}

// Flush hands what is in the buffer to the connection.
func (c *Conn) Flush() error { return c.out.Flush() }

// sendOff has what is in the buffer leave, and waits for that until ctx ends. Then it reports false, and the caller has
// nothing to do with the connection any more, which ends once all has left.
func (c *Conn) sendOff(ctx context.Context) bool {
	c.abandoned.Store(false)
	if !c.owner.SendAway() {
		return true // nothing leaves any more
	}
	select {
	case <-c.sent:
		return true
	case <-ctx.Done():
	}
	if c.abandoned.CompareAndSwap(false, true) {
		return false
	}
	<-c.sent
	return true
}

// SendAway flushes the buffer while its owner waits. It ends when all has left, and with it the connection if the owner does not
// wait any more.
func (c *Conn) SendAway() {
	c.Flush()
	if c.abandoned.CompareAndSwap(false, true) {
		c.sent <- struct{}{}
	} else {
		c.fail(errGivenUp)
	}
}

// Quit says QUIT, if that was not said yet. The read loop sees the rest.
func (c *Conn) Quit() {
	c.mu.Lock()
	said := c.quitting || c.cause != nil
	c.mu.Unlock()
	if said || !c.writeQuit(false) || c.Flush() != nil {
		return
	}
	c.mu.Lock()
	alone := len(c.waiting)-c.head <= 1
	c.mu.Unlock()
	if alone { // else once the reply to QUIT is in: until then there are messages for which the relay may look whether we are there
		c.endTLS()
	}
}

// writeQuit puts QUIT into the buffer; behind tells whether it stands behind a final dot that has no reply yet.
func (c *Conn) writeQuit(behind bool) bool {
	const command = "QUIT\r\n"
	end := c.position() + int64(len(command))
	if !c.expect(exchange{op: StepQuit, limit: c.o.Timeouts.untilFIN(), first: behind, end: end}) {
		return false
	}
	c.mu.Lock()
	c.quitting = true
	c.mu.Unlock()
	c.out.WriteString(command)
	c.traceCommand(context.Background(), "QUIT")
	return true
}

// endTLS tells the relay that the end of TLS is meant (RFC 8446, 6.1). It is for a session that has ended in order: one that is
// given up in the middle of a message must not look like it.
func (c *Conn) endTLS() {
	if tc, ok := c.conn.(*tls.Conn); ok {
		tc.CloseWrite() // which takes five seconds at most; the relay reads, or is not there any more
	}
}

func (c *Conn) traceCommand(ctx context.Context, line string) {
	if c.trace.Command != nil {
		c.trace.Command(ctx, line)
	}
}
