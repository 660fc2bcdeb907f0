package smtptest

import (
	"context"
	"slices"
	"time"
)

// Step is a point of the dialogue at which a [Fault] can strike.
type Step int

const (
	// Connect: before the greeting.
	Connect Step = iota + 1
	// EHLO: EHLO or HELO has arrived.
	EHLO
	// StartTLS: STARTTLS has arrived.
	StartTLS
	// TLSHandshake: before the TLS handshake, which follows the reply to STARTTLS or, with StartTLS, precedes the greeting. A
	// Reply is sent in plaintext, in place of the handshake.
	TLSHandshake
	// Auth: AUTH has arrived. A Reply that begins with 334 replaces the relay's own challenge: an initial response in the command
	// is ignored, and the next line is read as the response.
	Auth
	// AuthResponse: the client has answered a challenge of AUTH. A Reply that begins with 334 is one more challenge, and the
	// response is ignored.
	AuthResponse
	// Mail: MAIL has arrived.
	Mail
	// Rcpt: RCPT has arrived.
	Rcpt
	// Data: DATA has arrived. After a Reply that begins with 354 the relay reads a body even if there is no recipient.
	Data
	// Body: part of the body has arrived, at least Fault.AfterBytes of it. A fault strikes once in a body.
	Body
	// FinalDot: the final dot or the last chunk of BDAT has arrived. The relay has not accepted the message yet.
	FinalDot
	// Accepted: the relay has accepted the message, and not replied yet.
	Accepted
	// Bdat: BDAT has arrived; its chunk has not been read. With Server.KeepRefusedChunks, a chunk refused here is read as
	// commands.
	Bdat
	// Rset: RSET has arrived.
	Rset
	// Noop: NOOP has arrived.
	Noop
	// Quit: QUIT has arrived.
	Quit
	// Other: any other command has arrived.
	Other
	// Idle: the relay has answered everything, and waits for a command outside a transaction. The fault strikes if nothing
	// arrives for its Delay. If it is set while a connection is idle, the time that the connection has been idle counts. A Fault
	// without At does not strike at Idle.
	Idle

	steps
)

var stepNames = [steps]string{
	"any step", "greeting", "EHLO", "STARTTLS", "TLS handshake", "AUTH", "AUTH response", "MAIL", "RCPT", "DATA", "body", "final dot",
	"message accepted", "BDAT", "RSET", "NOOP", "QUIT", "other command", "idle",
}

// String returns the step's name: the command, or what happens at it.
func (s Step) String() string {
	if s < 0 || s >= steps {
		return "unknown step"
	}
	return stepNames[s]
}

// Event is an event on a connection, passed to [Fault].When. It is a snapshot, and its slice must not be changed.
type Event struct {
	Step    Step
	Addr    int      // the address of the relay that the connection was made to, 1-based; see Server.Addresses
	Conn    int      // the connection, 1-based over all addresses
	N       int      // 1-based number of this event among the connection's events of this Step
	Message int      // number of MAIL commands on the connection, including this one
	Line    string   // the command line, without the credentials of AUTH; "" if there is none
	From    string   // the envelope sender of the transaction, or of this MAIL
	To      []string // the recipients accepted so far in this transaction
	Rcpt    string   // the envelope recipient of this RCPT
	Bytes   int64    // octets of the body received so far

	// Accepted and Recipients are the numbers of messages and of recipients that the relay has accepted on this connection so far.
	// Recipients includes those of transactions without an accepted message.
	Accepted, Recipients int

	// Pipelined says that the client did not wait for the reply: more data had arrived after the command (at Bdat, after its
	// chunk) when the relay processed it. It is always false at Connect, TLSHandshake, Body and Idle.
	Pipelined bool

	// AuthLed says that the connection's last AUTH was Pipelined. At Mail with N == 1, the MAIL was pipelined after AUTH.
	AuthLed bool

	chunk int64 // octets of a BDAT's chunk that were not read yet
}

// Fault says what goes wrong, where, and how often. A Fault is a value: [Server.Fault] copies it.
//
// The fields of the first two groups are filters, joined by AND; the zero value of each matches everything. An event meets the
// faults in the order in which they were set. Faults that only delay add up. After the first fault that does more, no other
// strikes, but each counts the event for its Nth. A Fault without an effect is an observer: it counts hits whatever the others
// do.
type Fault struct {
	// Which event:

	At              Step             // the step; 0 means any but Idle
	Addr            int              // connections to this address of the relay only, 1-based
	Conn            int              // this connection only, 1-based
	Rcpt            string           // at Rcpt: this recipient; anywhere else: envelopes with this recipient. Case is ignored
	AfterBytes      int64            // after this many octets of the body
	AfterMessages   int              // after this many accepted messages on the connection: a limit of the session
	AfterRecipients int              // after this many accepted recipients on the connection, in all transactions together
	Pipelined       bool             // only if the client did not wait for the reply; see Event.Pipelined
	When            func(Event) bool // called from the goroutines of connections, possibly several at once; must not block

	// Which of the events that match the filters above:

	Nth   int // from the Nth on, 1-based since the fault was set; 0 means 1
	Every int // of the events from the Nth on, only every Every-th: with 10 the tenth, the twentieth and so on; 0 means 1

	// Rate lets this many events per second pass and strikes the others, like a relay that throttles. It is a token bucket for
	// all connections together: an event that passes takes a token, which is refilled after 1/Rate seconds; an event that is
	// struck takes none. It uses the clock of package time, so it is exact in a synctest bubble. 0 means no rate. A permanent
	// limit also needs a Count of -1.
	Rate float64

	// Burst is how many events may pass at once if Rate is set; 0 means as many as pass in a second, but at least one.
	Burst int

	// What happens:

	// Delay comes first: the relay waits this long. At Idle it is how long the connection must be idle.
	Delay time.Duration

	// Stall then sends nothing, and reads no more than fits into a buffer, until the fault is removed, the client closes, or the
	// relay is closed.
	Stall bool

	// Reply replaces the relay's reply, such as "452 4.4.5 Too many messages"; lines are separated by "\n". After a 2xx or 3xx
	// reply the command is executed as usual. After any other reply it is not executed; at FinalDot that means that the message
	// is not accepted. In a Body, Reply is sent at once in place of the final reply, and the message is not accepted whatever
	// Reply is. A 421 does not close the connection: set Drop for that.
	Reply string

	// Drop closes the connection after Reply, or without a reply, with FIN and without TLS's close_notify. The command is not
	// executed unless there is a 2xx or 3xx Reply.
	Drop bool

	// Abort does the same with RST, which may destroy replies in flight. It takes precedence over Drop.
	Abort bool

	// Discard discards, after the reply to the command, the data that has arrived after the command, so that it gets no reply.
	// During a Body, or at Bdat, that is the data after the message or the chunk.
	Discard bool

	// How often:

	// Count is how often the fault strikes; 0 means once, negative means until it is removed.
	Count int
}

// FaultHandle counts the hits of a Fault that was set, waits for them, and removes the Fault. Its methods are safe for
// concurrent use.
type FaultHandle struct {
	s *Server
	f Fault

	removed chan struct{} // closed by Remove

	// guarded by s.mu
	gone   bool // by Remove
	passed int  // events that the filters matched
	hits   int
	struck chan struct{} // closed at the next hit
	full   time.Time     // when the token bucket is full again
}

// Fault sets a fault, which also applies to open connections. It may be called at any time, even before Start.
func (s *Server) Fault(f Fault) *FaultHandle {
	if f.Count == 0 {
		f.Count = 1
	}
	h := &FaultHandle{s: s, f: f, removed: make(chan struct{}), struck: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setFaultsLocked(append(s.faultList(), h))
	if f.At == Idle {
		for _, c := range s.conns {
			c.wakeLocked() // the idle ones look for an Idle fault now
		}
	}
	return h
}

// Hits returns how often the fault has struck.
func (h *FaultHandle) Hits() int {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	return h.hits
}

// Wait waits until the fault has struck n times since it was set, or returns the error of ctx.
func (h *FaultHandle) Wait(ctx context.Context, n int) error {
	for {
		h.s.mu.Lock()
		hits, struck := h.hits, h.struck
		h.s.mu.Unlock()
		if hits >= n {
			return nil
		}
		select {
		case <-struck:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Remove removes the fault. Connections that it has stalled continue. Calling it again does nothing.
func (h *FaultHandle) Remove() {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if !h.gone {
		h.gone = true
		close(h.removed)
		h.s.dropFaultLocked(h)
	}
}

func (s *Server) faultList() []*FaultHandle {
	if p := s.faults.Load(); p != nil {
		return *p
	}
	return nil
}

// setFaultsLocked replaces the list with a copy: connections read it without a lock.
func (s *Server) setFaultsLocked(list []*FaultHandle) {
	list = slices.Clone(list)
	s.faults.Store(&list)
}

func (s *Server) dropFaultLocked(h *FaultHandle) {
	list := slices.Clone(s.faultList())
	s.setFaultsLocked(slices.DeleteFunc(list, func(x *FaultHandle) bool { return x == h }))
}
