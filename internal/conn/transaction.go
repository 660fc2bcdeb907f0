package conn

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/smtprelay/smtprelay/internal/wire"
)

// Transaction is one attempt to send a message on one connection, to all or some of its recipients:
//
//	[AUTH] [RSET] MAIL RCPT… DATA    in one write, if pipelined
//	body and final dot               if DATA was answered by 354
//	[QUIT]                           if this is the connection's last transaction
//
// The transaction returns the write side to the Owner as soon as the final dot is written. Another transaction may then begin on
// the connection while this one waits for its final reply (RFC 2920, 3.1).
type Transaction struct {
	ctx  context.Context
	c    *Conn
	m    Message
	mail wire.MailParams // the parameters that MAIL sends

	// result is the Result so far. The replies, Worked, Cancelled, After421 and Contradicted are guarded by c.mu; the other
	// fields are owned by the holder of the write side.
	result Result

	signal       chan struct{} // buffered, size 1: a reply has arrived, or stall has run out
	stall        *time.Timer   // runs while the envelope waits after an unanswered final dot
	clearing     bool          // RSET must succeed: the relay has another envelope open
	holdsPrevDot bool          // the previous transaction's final dot is still in the write buffer
	held         bool          // with chunks: the body waits for the replies to the envelope
	endAt        int64         // once this position is written the relay may have the message; 0: the end is not in the buffer yet
	chunks       chunkedBody
	sinkErr      error // why Write accepts no more of the body
	lostWriting  bool  // sinkErr is a failed write to the connection
	bodyOver     bool  // all of the body is written in chunks; only the last, empty chunk is missing
	handedOver   bool  // another holder has the write side
	shared       bool  // guard's function may still be running and read this transaction
	known        bool  // set by conclude: the read loop or guard's function may still read this transaction

	unguard func() bool  // stops the function that guard has set
	taken   []wire.Reply // copy of result.Rcpt that conclude returns

	// Guarded by c.mu.
	asked, answered int  // commands of the envelope, and replies to them
	notified        bool // the final reply has arrived and Owner.Changed was called
}

// NewTransaction prepares a transaction for m. The caller holds the write side of c, and calls Run once, then Recycle.
func NewTransaction(ctx context.Context, c *Conn, m Message) *Transaction {
	t, ok := c.o.transactions.Get().(*Transaction)
	if !ok {
		t = newTransaction()
	}
	t.ctx, t.c, t.m, t.mail, t.unguard = ctx, c, m, m.Mail, unguarded
	for range m.Rcpts {
		t.result.Rcpt = append(t.result.Rcpt, wire.Reply{})
	}
	select {
	case <-t.signal:
	default:
	}
	return t
}

// newTransaction returns an empty Transaction for the pool.
func newTransaction() *Transaction {
	signal := make(chan struct{}, 1)
	stall := time.AfterFunc(time.Hour, func() { notify(signal) })
	stall.Stop()
	return &Transaction{signal: signal, stall: stall}
}

// conclude returns the Result. Run calls it once, when nothing more of t will be written.
func (t *Transaction) conclude() Result {
	c := t.c
	ctxErr := ContextError(t.ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	t.known = t.shared || t.asked != t.answered || t.endAt > 0 && !t.notified
	t.taken = append(t.taken[:0], t.result.Rcpt...) // replies that arrive later are not part of the result
	r := t.result
	r.Rcpt = t.taken
	r.Begun, r.Used, r.Body, r.Size, r.CtxErr = t.asked > 0, c.used, t.m.Body, t.m.Size, ctxErr
	r.Lost, r.Left421, r.OutOfStep = c.ending.cause, c.ending.left421, c.ending.outOfStep
	switch {
	case t.endAt == 0:
	case c.attempted >= t.endAt:
		r.End = EndSent
	case c.ending.cause == nil && c.writeErr == nil:
		r.End = EndDue
	default:
		r.End = EndUnsent
	}
	if t.answered < t.asked {
		for _, x := range c.waiting.all() {
			if x.tx == t {
				r.Waiting, r.WaitingRcpt = x.op, x.rcpt
				break
			}
		}
	}
	return r
}

// Recycle returns t to the pool. The caller must not use the Result afterwards.
func (t *Transaction) Recycle() {
	if t.known {
		return
	}
	o := t.c.o
	if t.chunks.buffer != nil {
		chunkPool.Put(t.chunks.buffer)
	}
	clear(t.result.Rcpt) // do not keep reply texts alive in the pool
	clear(t.taken)
	*t = Transaction{signal: t.signal, stall: t.stall, result: Result{Replies: Replies{Rcpt: t.result.Rcpt[:0]}}, taken: t.taken[:0]}
	o.transactions.Put(t)
}

// Run performs the transaction and returns its Result. It always returns the write side to the Owner. The Result is valid until
// Recycle.
func (t *Transaction) Run() Result {
	if t.write() {
		t.awaitFinal()
	}
	return t.conclude()
}

// write performs the transaction up to its final dot, returns the write side to the Owner, and reports whether to wait for a
// final reply.
func (t *Transaction) write() (dotted bool) {
	c := t.c
	defer func() {
		if !t.handedOver {
			c.owner.Release()
		}
	}()
	t.holdsPrevDot = c.out.Buffered() > 0
	if t.ctx.Err() != nil {
		return false // nothing of this transaction was written; Release flushes the previous one's final dot
	}
	completed := false
	defer func() {
		if !completed { // Body.WriteTo or BeforeEnd has panicked in the middle of a message
			c.fail(&GivenUpError{errors.New("the body, or BeforeEnd, panicked")})
		}
	}()
	dotted = t.converse()
	completed = true
	return dotted
}

func (t *Transaction) converse() (due bool) {
	defer func() { t.unguard() }()
	t.result.Chunked = t.goesInChunks()
	// Flush the previous message's final dot before producing our body, so that a slow body cannot delay it. Both guard and send
	// stop blocking when our context ends.
	if !t.holdsPrevDot {
		t.guard()
	} else if !t.fitsBuffer() && !t.send() {
		return false
	}
	if t.result.Chunked && OneShot(t.m.Body) {
		if t.result.BodyErr = t.readAhead(); t.result.BodyErr != nil {
			return false
		}
		t.result.Chunked = t.goesInChunks()
	}
	if t.result.Chunked {
		return t.converseInChunks() && t.part()
	}
	if !t.beginData() {
		return false
	}
	t.c.body.Reset(t.c.out, true)
	if err := t.writeBody(); err != nil {
		t.giveUp(err)
		return false
	}
	return t.part()
}

// beginData sends the envelope and DATA, and reports whether the relay is ready for the body.
func (t *Transaction) beginData() bool {
	for {
		if !t.envelope() || !t.askData() || !t.send() || !t.awaitEnvelope() {
			return false
		}
		if !t.overlapRefused() {
			return t.startData()
		}
		t.repeat()
	}
}

// part writes the end of the message: the final dot or the last chunk. If another message waits for the connection, the end stays
// in the buffer and leaves in one write with that message's envelope; our context does not cancel that write.
func (t *Transaction) part() (due bool) {
	if t.m.BeforeEnd != nil && !t.mayEnd() {
		return false
	}
	if room := t.remaining() + endRoom; t.c.owner.Wanted() && room <= outBuffer {
		if int64(t.c.out.Available()) < room {
			t.c.Flush() // our context still cancels this write; if the buffer held another message's final dot, fitsBuffer has checked the room
		}
		if !t.unguard() || !t.end() {
			return false
		}
		if t.handedOver = t.c.owner.Handoff(); t.handedOver {
			return true
		}
		if t.holdsPrevDot {
			return true // Release flushes; the buffer holds another message's end, so our context must not cancel the write
		}
		t.guard() // no other message took the connection: our context may cancel the flush
		t.c.Flush()
		t.unguard()
		return true
	}
	if !t.end() {
		return false
	}
	t.c.Flush()
	return true
}

// mayEnd writes the rest of the body, flushes the buffer and calls BeforeEnd. It reports whether the end of the message may
// follow. The flush comes first, because the buffer may hold the end of another message and that must not wait for BeforeEnd.
func (t *Transaction) mayEnd() bool {
	c := t.c
	if t.result.Chunked {
		if t.bodyOver = t.lastChunks(); !t.bodyOver {
			return false
		}
	}
	if !t.send() || t.result.Chunked && t.unwanted() {
		return false
	}
	to := make([]string, len(t.m.Rcpts))
	for i := range to {
		to[i], _ = t.m.recipient(i)
	}
	ctx, cancel := context.WithCancelCause(t.ctx)
	defer cancel(nil)
	if !c.onLoss(cancel) {
		return false
	}
	defer c.onLoss(nil)
	err := t.m.BeforeEnd(ctx, to)
	if err == nil {
		return true
	}
	if t.ctx.Err() == nil && ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return false // BeforeEnd returned because the connection was lost
	}
	t.result.EndErr = fmt.Errorf("BeforeEnd: %w", err)
	c.fail(&GivenUpError{t.result.EndErr})
	return false
}

// endRoom is the maximum size of the commands around the end of a message: two BDAT and a QUIT.
const endRoom = 64

// fitsBuffer reports whether everything we write before waiting for a reply fits into the rest of the write buffer.
func (t *Transaction) fitsBuffer() bool {
	room := int64(t.c.out.Available()) - t.envelopeRoom()
	switch {
	case !t.result.Chunked:
		return room >= 0
	case !isBytes(t.m.Body):
		return false // the body is produced before its envelope is written
	case t.waitsForRcpts() || !t.c.inStep || !t.c.overlapped:
		return room >= 0 // the body will be held
	}
	return room >= t.remaining()+endRoom
}

// envelopeRoom returns the maximum size of the envelope's commands.
func (t *Transaction) envelopeRoom() int64 {
	const commands, coded = 256, 6 // octets per command; octets per encoded octet of a parameter
	n := commands + len(t.m.From) + coded*len(t.mail.EnvelopeID)
	if t.mail.Auth != nil {
		n += coded * len(*t.mail.Auth)
	}
	for i := range t.result.Rcpt {
		addr, p := t.m.recipient(i)
		n += len("RCPT TO:<>\r\n") + len(addr)
		if p.Notify != nil || p.Orcpt != "" || !p.Since.IsZero() {
			n += commands + coded*len(p.Orcpt)
		}
	}
	return int64(n)
}

// send flushes the buffer. If the buffer holds the previous message's final dot, the end of our context does not interrupt the
// write: send returns early, and the connection ends after the write. After send, the end of our context ends the transaction.
func (t *Transaction) send() bool {
	carried := t.holdsPrevDot
	if carried && t.ctx.Done() != nil {
		if t.handedOver = !t.c.sendOff(t.ctx); t.handedOver {
			return false
		}
	}
	t.holdsPrevDot = false
	sent := t.sendNow() // false if SendAway's flush failed: a bufio.Writer keeps its error
	if carried {
		t.guard()
	}
	return sent
}

// giveUp ends the connection because the body cannot be completed. Only closing without the final dot keeps the relay from
// accepting a truncated message.
func (t *Transaction) giveUp(err error) {
	if t.lostWriting {
		t.explained() // the connection failed, not the body
		return
	}
	t.result.BodyErr = err
	t.c.fail(&GivenUpError{fmt.Errorf("the body failed: %w", err)})
}

// sendNow flushes the buffer.
func (t *Transaction) sendNow() bool { return t.c.Flush() == nil || t.explained() }

// unguarded is the unguard func while no guard is set.
func unguarded() bool { return true }

// guard fails the connection when the transaction's context ends, until t.unguard is called. unguard returns false if the
// context has ended. The connection stays open until the final replies of other messages have arrived.
func (t *Transaction) guard() {
	if t.ctx.Done() == nil {
		return
	}
	c, ctx := t.c, t.ctx
	cancel := func() {
		c.mu.Lock()
		t.result.Cancelled = t.result.Cancelled || c.ending.cause == nil
		c.failLocked(errGivenUp) // the cause that other transactions see
		c.armLocked()
		c.mu.Unlock()
		c.raw.interrupt() // after failLocked, so that the failed write does not become the cause
	}
	stop := context.AfterFunc(ctx, cancel)
	first, result := true, false
	t.unguard = func() bool {
		if first {
			if first, result = false, stop(); !result {
				t.shared = true
				cancel() // AfterFunc's goroutine may not have run yet; no other transaction may use the connection
			}
		}
		return result
	}
}

// GivenUpError is why we closed a working connection: a message could not be completed.
type GivenUpError struct{ Err error }

func (e *GivenUpError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *GivenUpError) Unwrap() error { return e.Err }

var errGivenUp = &GivenUpError{errors.New("the connection was closed because a message on it was cancelled")}

// maxFailed is how many consecutive transactions may fail before the connection is replaced. Relays count refusals and close the
// connection in the middle of a transaction after 10 (Exim) or 20 (Postfix).
const maxFailed = 8

// explained waits after a failed write until the read loop has recorded why the connection was lost, or the context ends. It
// returns false.
func (t *Transaction) explained() bool {
	select {
	case <-t.c.lost:
	case <-t.ctx.Done():
	}
	return false
}

// expect appends an exchange of the envelope.
func (t *Transaction) expect(x exchange) bool {
	x.tx = t
	return t.c.expect(x)
}

// end puts the final dot, or the rest of the last chunk, into the buffer, and QUIT after it if the connection takes no further
// transaction.
func (t *Transaction) end() bool {
	c := t.c
	if !t.result.Chunked {
		if !t.finish(StepFinalDot, ".") {
			return false
		}
	} else if !t.bodyOver && !t.lastChunks() || !t.finishChunks() {
		return false
	}
	c.mu.Lock()
	quit := c.phase != ready
	c.mu.Unlock()
	if quit && c.overlaps() {
		c.writeQuit(true)
	}
	return true
}

// finish writes the command that ends the message.
func (t *Transaction) finish(op Step, command string) bool {
	c := t.c
	// Some relays accept a last line without CRLF, so the message may be accepted as soon as the command itself was sent. Set endAt
	// before writing, because a full buffer is flushed during the write.
	t.endAt = c.position() + int64(len(command))
	if !c.expect(exchange{op: op, final: true, end: t.endAt + int64(len("\r\n")), tx: t, limit: c.o.Timeouts.FinalReply}) {
		t.endAt = 0
		return false
	}
	c.traceCommand(t.ctx, command)
	c.out.WriteString(command)
	c.out.WriteString("\r\n")
	return true
}

// awaitFinal waits for the final reply or the end of the connection. Once the context has ended, it waits for Timeouts.Drain at
// most.
func (t *Transaction) awaitFinal() {
	ended := t.ctx.Done()
	var drained <-chan time.Time
	for {
		t.c.mu.Lock()
		in := t.notified
		t.c.mu.Unlock()
		if in {
			return
		}
		select {
		case <-t.signal:
		case <-t.c.done:
			return
		case <-ended:
			ended = nil
			if drain := t.c.o.Timeouts.Drain; drain > 0 {
				timer := time.NewTimer(drain)
				defer timer.Stop()
				drained = timer.C
			}
		case <-drained:
			t.c.leave(t)
			return
		}
	}
}
