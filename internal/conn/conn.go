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
	inStep      bool              // the relay has answered an envelope in step, so a chunk may leave with its envelope

	sent      chan struct{} // has room for one; told by SendAway
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
	pending    int        // final replies outstanding
	used       int        // transactions begun
	failed     int        // transactions that came to nothing, in a row
	open       bool       // the relay may have a transaction open: RSET leads the next
	unended    bool       // the last one was given up before its end
	quitting   bool       // QUIT was written
	writeErr   error      // what a write failed with
	closeBy    time.Time  // when the relay's last words must be in
	heard      time.Time  // when the relay last answered
	deadline   time.Time  // the read deadline in force
	said421    bool       // the relay has, to a command
	left421    bool       // and has closed the connection in order: nothing that it said is missing
	auth       wire.Reply // the refusal of pendingAuth
	outOfStep  bool       // a reply cannot be that to its command, so those behind it are to others too
	abort      bool       // killed: the relay is not waited for
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
	Used    int        // transactions begun
	Pending int        // of these, final replies outstanding
	Reason  Reason     // why no further one is begun; "" while one may be
	Err     error      // the fault that Reason tells of
	Auth    wire.Reply // the refusal of the AUTH that led the first transaction
}

// Info returns how the connection is now.
func (s *Conn) Info() Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	info := Info{Used: s.used, Pending: s.pending, Reason: s.reason, Auth: s.auth}
	if s.reason == Fault {
		info.Err = s.cause
	}
	return info
}

// Extensions is what the relay has offered. It does not change.
func (s *Conn) Extensions() *wire.Extensions { return &s.ext }

// TLS is the state of TLS; nil in the clear. It does not change.
func (s *Conn) TLS() *tls.ConnectionState { return s.tls }

// Born is when the connection was opened.
func (s *Conn) Born() time.Time { return s.born }

// Expires is when the connection is too old to be used; zero means never. It does not change after Bound.
func (s *Conn) Expires() time.Time { return s.expires }

// Limit is how many transactions may be begun; 0 means any number. It does not change after Bound.
func (s *Conn) Limit() int { return s.limit }

// Bound sets how many transactions may be begun, 0 for any number, and until when, zero for any time. It is called before
// the first transaction.
func (s *Conn) Bound(transactions int, expires time.Time) {
	s.limit, s.expires = transactions, expires
}

// Buffered reports whether something was written that has not left: another transaction's final dot. It is for the holder of
// the write side.
func (s *Conn) Buffered() bool { return s.out.Buffered() > 0 }

// PendingAuth reports whether AUTH is still to be sent. It is for the holder of the write side.
func (s *Conn) PendingAuth() bool { return s.pendingAuth != nil }

// InterruptWrites ends a write that is under way and every later one.
func (s *Conn) InterruptWrites() { s.raw.interrupt() }

// Status returns what may be done with the connection. One whose time has come is retired by that, but for one that has not
// had a message yet: it may have taken that long to get ready, and the next one would too.
func (s *Conn) Status(now time.Time) Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used > 0 && !s.expires.IsZero() && !now.Before(s.expires) {
		s.retireLocked(Age)
	}
	switch {
	case s.phase >= draining, s.writeErr != nil:
		return Lost
	case s.phase == last && s.pending > 0:
		return Busy
	case s.phase == last:
		return Retired
	case s.pending == 0:
		return Free
	case s.overlaps() && s.pending < s.inFlightLocked():
		return Overlappable
	}
	return Busy
}

// pipelining reports whether commands may be written without awaiting the reply to the one before.
func (s *Conn) pipelining() bool {
	return s.o.Pipelining && s.ext.Has("PIPELINING")
}

// overlaps reports whether commands may be written behind a final dot.
func (s *Conn) overlaps() bool {
	return s.o.Overlap && s.pipelining() && s.o.Profile.Overlaps()
}

// inFlightLocked is how many messages may be on their way whose final reply is not in. With DATA it is two: the next one's
// body waits for a 354 that comes behind that reply. In chunks it is MaxInFlight, once the relay has shown on this connection
// that it answers what leaves together with the end of a message.
func (s *Conn) inFlightLocked() int {
	switch {
	case !s.chunked:
		return 2
	case !s.overlapped:
		return min(2, s.o.MaxInFlight)
	}
	return s.o.MaxInFlight
}

// Usable reports whether transactions may be begun yet, now or later.
func (s *Conn) Usable() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.phase == ready && (s.limit == 0 || s.used < s.limit)
}

// LastRoom is how many more transactions may be begun on a session that is in the last fifth of its life; 0 on another, and
// on one that was not heard of since.
func (s *Conn) LastRoom(since time.Time) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	left := s.limit - s.used
	if s.phase != ready || s.limit == 0 || left > s.limit/5 || s.heard.Before(since) {
		return 0
	}
	return left
}

// Failed reports whether the session ends early, once the messages that are on their way have come to their end.
func (s *Conn) Failed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reason == Fault
}

// Retire makes the connection take no further transaction.
func (s *Conn) Retire(why Reason) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retireLocked(why)
}

func (s *Conn) retireLocked(why Reason) {
	if s.phase == ready {
		s.phase, s.reason = last, why
	}
}

// Reading.

// ReadLoop runs until the connection has ended. It alone reads.
func (s *Conn) ReadLoop() {
	var err error
	for more := true; more; {
		var r wire.Reply
		if r, _, err = s.readReply(false); err != nil {
			break
		}
		more = s.deliver(r)
	}
	s.mu.Lock()
	s.failLocked(s.lossLocked(err))
	s.mu.Unlock()
	s.raw.interrupt()
	s.mu.Lock()
	for s.attempted != s.written { // until then nobody knows what has left
		s.wrote.Wait()
	}
	wait := s.o.Timeouts.Quit
	waited := s.quitting && (s.head == len(s.waiting) || s.waiting[s.head].op == StepQuit)
	if s.abort || waited && s.writeErr == nil && IsTimeout(err) && s.deadline != longAgo {
		wait = 0 // QUIT had its time already
	}
	s.phase, s.left421 = closing, s.said421 && errors.Is(err, io.EOF)
	s.mu.Unlock()
	close(s.done)
	s.owner.Changed()

	// A clean end of TLS is not yet the close of the connection below.
	if _, onTLS := s.conn.(*tls.Conn); ClosedByPeer(err) && !onTLS {
		s.raw.Close()
	} else {
		s.raw.hangUp(wait)
	}
	s.owner.Closed()
}

// deliver gives r to the oldest exchange outstanding and reports whether there is more to read.
func (s *Conn) deliver(r wire.Reply) (more bool) {
	s.traceReply(r)
	s.mu.Lock()
	if s.earlyLocked(r) {
		s.failLocked(&UnexpectedReply{Reply: r})
		s.mu.Unlock()
		return false
	}
	s.heard = time.Now()
	x := s.waiting[s.head]
	s.waiting[s.head] = exchange{}
	s.head++
	if s.head == len(s.waiting) {
		s.waiting, s.head = s.waiting[:0], 0
	}
	if (x.op == StepMail || x.op == StepRset) && x.tx.seq > 1 && (r.Code == 421 || x.op == StepMail && s.o.Profile.MeansFull(r)) {
		s.o.Profile.SessionFull(x.tx.seq-1, s.born)
	} else if x.op == StepMail && r.Class() == 2 {
		s.o.Profile.SessionGoesOn(x.tx.seq)
	}
	if r.Code == 421 && x.op != StepQuit {
		// The relay is leaving, whatever it may still say to what was sent already.
		s.said421 = true
		s.hurryLocked(s.o.Timeouts.Quit)
		s.failLocked(&ReplyError{Step: x.op, Reply: r})
	}
	if x.tx != nil {
		x.tx.replyLocked(x, r)
	} else if x.first && r.Code == 503 {
		s.o.Profile.OverlapFailed()
	}
	if x.op == StepQuit {
		// What is left is to see the relay's close.
		s.hurryLocked(s.o.Timeouts.Quit)
	}
	if x.final {
		s.pending--
	}
	if next := s.replies.Peek(); next != 0 && s.head == len(s.waiting) {
		switch {
		case x.final && next/100 != r.Class() && next != 421 && next != 221:
			x.tx.contradicted = true
		case !x.final && next < 400:
			s.failLocked(errExtraReply) // before anybody acts on replies that may be those to other commands
		}
	}
	s.armLocked()
	more = !s.outOfStep && (s.phase < draining || s.dueLocked())
	s.mu.Unlock()

	if x.final {
		if more {
			s.owner.Changed()
		}
		// Second: a sender who has another message at once is to find this session idle, and not to open one more.
		s.mu.Lock()
		x.tx.told = true
		x.tx.wake()
		s.mu.Unlock()
	}
	return more
}

// earlyLocked reports whether r comes before the command that it would answer has left. No relay can answer that, so r is
// one reply too many, and all replies behind it would be taken for those to other commands. A refusal is believed: a relay may
// refuse a message of which it has not read the end.
func (s *Conn) earlyLocked(r wire.Reply) bool {
	return s.head == len(s.waiting) || r.Class() < 4 && s.waiting[s.head].end > s.attempted
}

// errExtraReply ends a session whose relay has sent more replies than it was given commands.
var errExtraReply = errors.New("the relay sent a reply too many")

// readReply reads a reply, long if it may carry data. From here on nobody sees what the relay repeats of the credentials, but for what was read raw.
func (s *Conn) readReply(long bool) (r wire.Reply, raw string, err error) {
	read := s.replies.ReadReply
	if long {
		read = s.replies.ReadLong
	}
	if r, err = read(); err != nil {
		if m, ok := errors.AsType[*wire.MalformedError](err); ok {
			err = &wire.MalformedError{Line: s.said.Scrub(m.Line)}
		}
		return r, "", err
	}
	raw = r.Text
	r.Text = s.said.Scrub(raw)
	return r, raw, nil
}

// traceReply tells of a reply before anybody acts on it.
func (s *Conn) traceReply(r wire.Reply) {
	if s.trace.Reply == nil {
		return
	}
	var x exchange
	ctx := context.Background()
	s.mu.Lock()
	if s.head < len(s.waiting) {
		if x = s.waiting[s.head]; x.tx != nil {
			ctx = x.tx.ctx
		}
	}
	s.mu.Unlock()
	s.trace.Reply(ctx, x.op, r)
}

// armLocked sets the read deadline to that of the oldest exchange outstanding.
func (s *Conn) armLocked() {
	if s.phase == closing {
		return
	}
	var at time.Time
	switch {
	case s.cause != nil && !s.dueLocked():
		at = longAgo
	case s.head < len(s.waiting):
		if x := s.waiting[s.head]; x.limit > 0 && x.end <= s.written {
			at = time.Now().Add(x.limit)
		}
	}
	if !s.closeBy.IsZero() && (at.IsZero() || s.closeBy.Before(at)) {
		at = s.closeBy
	}
	if at != s.deadline {
		s.deadline = at
		s.raw.SetReadDeadline(at)
	}
}

// dueLocked reports whether a doomed session still has a final reply to come: not to a final dot that never left, or left
// in part.
func (s *Conn) dueLocked() bool {
	return slices.ContainsFunc(s.waiting[s.head:], func(x exchange) bool { return x.final && x.end <= s.attempted })
}

// hurryLocked bounds how long the relay is listened to from now on.
func (s *Conn) hurryLocked(d time.Duration) {
	if by := time.Now().Add(d); s.closeBy.IsZero() || by.Before(s.closeBy) {
		s.closeBy = by
	}
}

// lossLocked turns err, with which reading ended, into the reason why the session is lost.
func (s *Conn) lossLocked(err error) error {
	if s.writeErr != nil && (err == nil || IsTimeout(err) || ClosedByPeer(err)) {
		return s.writeErr // the cause, of which the end of reading is a consequence
	}
	if err == nil || s.head == len(s.waiting) {
		return err
	}
	x := s.waiting[s.head]
	if !IsTimeout(err) {
		return err
	}
	if x.first && (s.cause == nil || time.Since(s.heard) >= tellingSilence) {
		// What stood behind the final dot was thrown away. It is cheap to be wrong about this, and dear to wait again.
		s.o.Profile.OverlapFailed()
	}
	return &TimeoutError{Step: x.op, After: x.limit}
}

// tellingSilence is how long there must be no reply to what stood behind a final dot, once that has its own, to conclude
// anything from it where the one who waited has given up. A caller may do so at any moment, whatever the relay is like.
const tellingSilence = time.Second

// Ending.

// fail ends the use of the session because of err. It may be called from anywhere, any number of times; the first cause
// counts. Final replies that are outstanding are still awaited.
func (s *Conn) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failLocked(err)
	s.armLocked()
}

func (s *Conn) failLocked(err error) {
	if s.phase >= draining {
		return
	}
	if err == nil {
		err = errors.New("session ended")
	}
	s.cause = err
	s.retireLocked(Fault)
	s.phase = draining
	close(s.lost)
}

// stepLostLocked ends the connection because of a reply that cannot be that to its command. No final reply is awaited any
// more: what comes would be taken for the reply to another message.
func (s *Conn) stepLostLocked(err error) {
	s.outOfStep = true
	s.failLocked(err)
}

// Kill ends the connection now, awaiting nothing.
func (s *Conn) Kill(err error) {
	s.mu.Lock()
	s.failLocked(err)
	s.abort = true
	s.closeBy = longAgo
	s.armLocked()
	s.mu.Unlock()
	s.raw.abandon() // second, so that the end of reading and writing is known to be a consequence
}

// lastWords is how long the relay may take to say why it does not take what is written.
const lastWords = 2 * time.Second

// writeFailed notes that a write has failed. The relay's last reply tells more than "broken pipe", so there is a short time
// for it to be read.
func (s *Conn) writeFailed(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writeErr == nil {
		s.writeErr = err
	}
	switch {
	case s.cause != nil: // the write was interrupted
	case IsTimeout(err):
		s.failLocked(err) // the relay stalls; it has not closed
	default:
		s.hurryLocked(lastWords)
	}
	s.armLocked()
}

// Writing. All of it is for the holder of the write side.

// Write hands p to the connection; it is what out writes to. Once the connection is lost nothing leaves any more: that is
// what makes a final dot that was not sent by then a message that was not accepted.
func (s *Conn) Write(p []byte) (int, error) {
	s.mu.Lock()
	if s.phase >= draining {
		s.mu.Unlock()
		return 0, s.cause
	}
	s.attempted = s.written + int64(len(p))
	s.mu.Unlock()
	n, err := s.conn.Write(p)
	s.mu.Lock()
	before := s.written
	s.written += int64(n)
	s.attempted = s.written
	if s.head < len(s.waiting) && s.waiting[s.head].end > before {
		s.armLocked() // until now the limit was that of writing
	}
	s.wrote.Broadcast()
	s.mu.Unlock()
	if err != nil {
		s.writeFailed(err)
	}
	return n, err
}

// position is the number of octets written so far, those in the buffer included.
func (s *Conn) position() int64 { return s.written + int64(s.out.Buffered()) }

// expect appends an exchange for the command that is written next. It fails if the connection is lost.
func (s *Conn) expect(x exchange) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil {
		return false
	}
	s.waiting = append(s.waiting, x)
	switch {
	case x.final:
		s.pending++
		s.unended = false
	case x.tx != nil:
		x.tx.asked++
	}
	if len(s.waiting)-s.head == 1 {
		s.armLocked()
	}
	return true
}

// Flush hands what is in the buffer to the connection.
func (s *Conn) Flush() error { return s.out.Flush() }

// sendOff has what is in the buffer leave, and waits for that until ctx ends. Then it reports false, and the caller has
// nothing to do with the connection any more, which ends once all has left.
func (s *Conn) sendOff(ctx context.Context) bool {
	s.abandoned.Store(false)
	if !s.owner.SendAway() {
		return true // nothing leaves any more
	}
	select {
	case <-s.sent:
		return true
	case <-ctx.Done():
	}
	if s.abandoned.CompareAndSwap(false, true) {
		return false
	}
	<-s.sent
	return true
}

// SendAway flushes the buffer while its owner waits. It ends when all has left, and with it the session if the owner does not
// wait any more.
func (s *Conn) SendAway() {
	s.Flush()
	if s.abandoned.CompareAndSwap(false, true) {
		s.sent <- struct{}{}
	} else {
		s.fail(errGivenUp)
	}
}

// Quit says QUIT, if that was not said yet. The read loop sees the rest.
func (s *Conn) Quit() {
	s.mu.Lock()
	said := s.quitting || s.cause != nil
	s.mu.Unlock()
	if said || !s.writeQuit(false) {
		return
	}
	s.Flush()
}

// writeQuit puts QUIT into the buffer; behind tells whether it stands behind a final dot that has no reply yet.
func (s *Conn) writeQuit(behind bool) bool {
	const command = "QUIT\r\n"
	end := s.position() + int64(len(command))
	if !s.expect(exchange{op: StepQuit, limit: s.o.Timeouts.Quit, first: behind, end: end}) {
		return false
	}
	s.mu.Lock()
	s.quitting = true
	s.mu.Unlock()
	s.out.WriteString(command)
	s.traceCommand(context.Background(), "QUIT")
	return true
}

func (s *Conn) traceCommand(ctx context.Context, line string) {
	if s.trace.Command != nil {
		s.trace.Command(ctx, line)
	}
}
