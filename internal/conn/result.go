package conn

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/smtprelay/smtprelay/internal/wire"
)

// Step is a command, or another step of a connection, that something happened at. Its text is made for an operator to read.
type Step string

// The steps of a connection and of a transaction.
const (
	StepDial     Step = "dial"
	StepGreeting Step = "greeting"
	StepEHLO     Step = "EHLO"
	StepSTARTTLS Step = "STARTTLS"
	StepTLS      Step = "TLS handshake"
	StepAuth     Step = "AUTH"
	StepRset     Step = "RSET"
	StepMail     Step = "MAIL FROM"
	StepRcpt     Step = "RCPT TO"
	StepData     Step = "DATA"
	StepBody     Step = "sending the body"
	StepFinalDot Step = "final dot"
	StepBdat     Step = "BDAT"
	StepQuit     Step = "QUIT"
)

// Replies are the relay's replies to the commands of a transaction; Code 0: none.
type Replies struct {
	Auth, Rset, Mail wire.Reply
	Rcpt             []wire.Reply // one for each recipient
	Data             wire.Reply   // to DATA; or to BDAT, the first refusal of a chunk
	Final            wire.Reply   // to the final dot, or to the last chunk
}

// Result is what became of a transaction. It is taken once, when the transaction is over, and does not change.
type Result struct {
	Replies

	Waiting     Step // the oldest command of the envelope, or chunk, without reply; "": none
	WaitingRcpt int  // for Rcpt: which of Rcpt
	Begun       bool // a command was written

	End        End
	Chunked    bool        // the body went in chunks, and not behind DATA
	Overlapped bool        // begun behind a final dot that had no reply yet
	BodyBegun  bool        // the body was asked to write itself
	BodyErr    error       // why the body could not be completed
	EndErr     error       // the error of Message.BeforeEnd, for which the end of the message did not leave
	Body       io.WriterTo // what is left to send to others: one that was read ahead can be written again
	Size       int64       // of the message in its canonical form; 0: not known

	Seq  int // 1-based number of this transaction on its connection; 0: not begun
	Used int // transactions begun on the connection

	AfterIdle bool // the connection was idle for so long before that it may have been cut without a word
	Worked    bool // before the reply to MAIL the relay had decided over another message on this connection
	LedByAuth bool // AUTH was its first command, with the others behind it

	CtxErr    error // the context has ended
	Cancelled bool  // and that is why the connection was given up

	OutOfStep    bool // a reply could not be that to its command; what came behind it was not read
	After421     bool // Final is 2xx, and 421 was said before it
	Contradicted bool // another reply, which says the contrary, came together with Final

	// Lost is why the connection can be used no more: an *UnexpectedReply, a *ReplyError, an *AuthError, a *TimeoutError or a
	// fault of the network; nil: it works.
	Lost error
	// Left421 is set where the relay said 421 and closed the connection in order, so that nothing it said is missing.
	Left421 bool
}

// End tells how much has left of what ends a message: the final dot, or the last chunk.
type End int

const (
	EndUnwritten End = iota // none: it is not even in the write buffer
	EndUnsent               // none, and none will: the connection ended first
	EndDue                  // perhaps none yet; it will leave, since the connection works
	EndSent                 // some of it, at least: the relay may have the message
)

// Accepted is how many recipients the relay has accepted. Where it has refused MAIL it has accepted none, whatever it says
// to RCPT: it means the recipients of another envelope, which it has kept.
func (r *Replies) Accepted() int {
	if r.MailRefused() {
		return 0
	}
	return r.Agreed()
}

// Agreed is how many RCPTs the relay has said yes to.
func (r *Replies) Agreed() (n int) {
	for i := range r.Rcpt {
		if r.Rcpt[i].Class() == 2 {
			n++
		}
	}
	return n
}

// AuthRefused reports whether the relay has refused AUTH.
func (r *Replies) AuthRefused() bool { return isNot2xx(r.Auth) }

// MailRefused reports whether the relay has refused MAIL.
func (r *Replies) MailRefused() bool { return isNot2xx(r.Mail) }

func isNot2xx(r wire.Reply) bool { return r.Code != 0 && r.Class() != 2 }

// Refusal returns the relay's first refusal of the transaction, and for RCPT which of the recipients it is about; "" if there
// is none. What the relay says later is a consequence, as is its hanging up.
//
// A recipient's refusal is one of the transaction where all are refused, where all is set and they are to get the message
// together or not at all, and where it is a 421.
func (r *Replies) Refusal(all bool) (step Step, rcpt int) {
	switch {
	case r.AuthRefused():
		return StepAuth, 0
	case isNot2xx(r.Rset) && r.Mail.Class() != 2: // else it did no harm
		return StepRset, 0
	case r.MailRefused():
		return StepMail, 0
	}
	first, refused := -1, 0
	for i := range r.Rcpt {
		if isNot2xx(r.Rcpt[i]) {
			refused++
			if first < 0 || r.Rcpt[i].Code == 421 {
				first = i
			}
		}
	}
	switch {
	case first >= 0 && (refused == len(r.Rcpt) || all || r.Rcpt[first].Code == 421):
		return StepRcpt, first
	case r.Data.Class() >= 4:
		return StepData, 0
	}
	return "", 0
}

// AuthError is the relay's refusal of the AUTH that led the first transaction.
type AuthError struct{ Reply wire.Reply }

func (e *AuthError) Error() string { return string(StepAuth) + ": " + e.Reply.String() }

// UnexpectedReply is a reply that no command was waiting for: the relay is leaving, or is out of step.
type UnexpectedReply struct{ Reply wire.Reply }

func (e *UnexpectedReply) Error() string { return "unexpected reply: " + e.Reply.String() }

// ReplyError is a reply after which the connection cannot be used.
type ReplyError struct {
	Step  Step
	Reply wire.Reply
}

func (e *ReplyError) Error() string { return string(e.Step) + ": " + e.Reply.String() }

// TimeoutError says which reply did not come in time.
type TimeoutError struct {
	Step  Step
	After time.Duration
}

func (e *TimeoutError) Error() string {
	return fmt.Sprintf("no reply to %s within %v", e.Step, e.After)
}
func (e *TimeoutError) Timeout() bool   { return true }
func (e *TimeoutError) Temporary() bool { return true }

// ErrEmptyBody is the BodyErr of a body that has written nothing.
var ErrEmptyBody = errors.New("the body is empty: WriteTo has written nothing")

// SizeError is the BodyErr of a body that is larger than the relay takes.
type SizeError struct{ Limit int64 }

func (e *SizeError) Error() string {
	return fmt.Sprintf("the message is larger than the relay takes, %d octets (SIZE)", e.Limit)
}
