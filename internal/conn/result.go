package conn

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/smtprelay/smtprelay/internal/wire"
)

// Step is a command or another step of a connection. Its text appears in error messages.
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

// Replies are the relay's replies to the commands of a transaction; Code 0: no reply.
type Replies struct {
	Auth, Rset, Mail wire.Reply
	Rcpt             []wire.Reply // one for each recipient
	Data             wire.Reply   // to DATA; with chunks, the last 2xx or the first refusal of a chunk
	Final            wire.Reply   // to the final dot or the last chunk
}

// Result says how a transaction ended. It is a snapshot taken once, at the end of the transaction.
type Result struct {
	Replies

	Waiting     Step // the oldest command of the envelope, or chunk, without reply; "": none
	WaitingRcpt int  // the index in Rcpt, if Waiting is StepRcpt
	Begun       bool // a command was written

	End        End
	Chunked    bool        // the body was sent in chunks, not with DATA
	Overlapped bool        // the transaction began after an unanswered final dot
	BodyBegun  bool        // Body.WriteTo was called
	BodyErr    error       // why the body could not be completed
	EndErr     error       // the error of Message.BeforeEnd, because of which the end of the message was not sent
	Body       io.WriterTo // the body for a retry; a one-shot body that was read ahead can be written again
	Size       int64       // size of the message in canonical form; 0: unknown

	Seq  int // 1-based number of this transaction on its connection; 0: not begun
	Used int // transactions begun on the connection

	AfterIdle bool // the connection was idle for so long before that a firewall may have dropped it silently
	Worked    bool // before the reply to MAIL, the relay had accepted or refused another message on this connection
	LedByAuth bool // AUTH was pipelined as the first command

	CtxErr    error // the context's error, if it has ended
	Cancelled bool  // the end of the context ended the connection

	OutOfStep    bool // a reply was impossible for its command; later replies were not read
	After421     bool // Final is 2xx, but the relay had sent 421 before
	Contradicted bool // a reply of another class arrived together with Final

	// Lost is why the connection can no longer be used: an *UnexpectedReply, a *ReplyError, an *AuthError, a *TimeoutError or a
	// network error; nil: the connection works.
	Lost error
	// Left421 is set if the relay sent 421 and then closed the connection with FIN, so that no reply is missing.
	Left421 bool
}

// End says how much of the end of a message, the final dot or the last chunk, was sent.
type End int

const (
	EndUnwritten End = iota // nothing: the end is not even in the write buffer
	EndUnsent               // nothing, and nothing will be sent: the connection ended first
	EndDue                  // nothing yet; it will be sent, because the connection works
	EndSent                 // at least a part: the relay may have the message
)

// Accepted returns how many recipients the relay has accepted. If the relay has refused MAIL, it has accepted none: a positive
// reply to RCPT then belongs to an earlier envelope, which the relay has kept.
func (r *Replies) Accepted() int {
	if r.MailRefused() {
		return 0
	}
	return r.Agreed()
}

// Agreed returns how many RCPT commands the relay has replied 2xx to.
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

// Refusal returns the step at which the relay first refused the transaction, and for RCPT the index of the recipient; "" if the
// relay has not refused it. Later refusals, and the close of the connection, are consequences of the first.
//
// The refusal of a recipient refuses the transaction if all recipients are refused, if all (all or nothing) is set, or if the reply
// is 421.
func (r *Replies) Refusal(all bool) (step Step, rcpt int) {
	switch {
	case r.AuthRefused():
		return StepAuth, 0
	case isNot2xx(r.Rset) && r.Mail.Class() != 2: // if MAIL succeeded, the failed RSET did no harm
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

// UnexpectedReply is a reply without a command: the relay is closing the connection, or is out of step.
type UnexpectedReply struct{ Reply wire.Reply }

func (e *UnexpectedReply) Error() string { return "unexpected reply: " + e.Reply.String() }

// ReplyError is a reply after which the connection cannot be used any more.
type ReplyError struct {
	Step  Step
	Reply wire.Reply
}

func (e *ReplyError) Error() string { return string(e.Step) + ": " + e.Reply.String() }

// TimeoutError says which reply did not arrive in time.
type TimeoutError struct {
	Step  Step
	After time.Duration
}

func (e *TimeoutError) Error() string {
	if e.Step == StepGreeting {
		return fmt.Sprintf("no greeting within %v", e.After)
	}
	return fmt.Sprintf("no reply to %s within %v", e.Step, e.After)
}
func (e *TimeoutError) Timeout() bool   { return true }
func (e *TimeoutError) Temporary() bool { return true }

// ErrEmptyBody is the BodyErr if WriteTo has written nothing.
var ErrEmptyBody = errors.New("the body is empty: WriteTo has written nothing")

// SizeError is the BodyErr if the message exceeds the relay's SIZE limit.
type SizeError struct{ Limit int64 }

func (e *SizeError) Error() string {
	return fmt.Sprintf("the message is larger than the relay takes, %d octets (SIZE)", e.Limit)
}
