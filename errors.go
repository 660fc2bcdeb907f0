package smtprelay

import (
	"errors"
	"fmt"
	"net/textproto"
	"strings"

	"github.com/emersion/go-smtp"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/printable"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// ErrClosed is found by errors.Is in the error of a call to a Client that was shut down or closed.
var ErrClosed = errors.New("client closed")

// Outcome is what became of a message.
type Outcome int

const (
	// Unknown: the connection was lost, or the context ended, between the final dot and its reply. The relay may have
	// accepted the message; sending it again may deliver it twice (RFC 1047).
	Unknown Outcome = iota
	// Accepted: the relay has taken responsibility for the message, for one recipient at least.
	Accepted
	// NotAccepted: the relay has accepted nothing; sending again delivers nothing twice.
	NotAccepted
)

// String returns "unknown", "accepted" or "not accepted".
func (o Outcome) String() string {
	switch o {
	case Accepted:
		return "accepted"
	case NotAccepted:
		return "not accepted"
	}
	return "unknown"
}

// Op is the step that an [Error] happened in. Its text is made for an operator to read.
type Op string

const (
	OpConfig   Op = "configuration"
	OpCheck    Op = "checking the message"
	OpWait     Op = "waiting for a connection"
	OpDial     Op = "dial"
	OpGreeting Op = "greeting"
	OpEHLO     Op = "EHLO"
	OpSTARTTLS Op = "STARTTLS"
	OpTLS      Op = "TLS handshake"
	OpAuth     Op = "AUTH"
	OpRset     Op = "RSET"
	OpMail     Op = "MAIL FROM"
	OpRcpt     Op = "RCPT TO"
	OpData     Op = "DATA"
	OpBody     Op = "sending the body"
	OpFinalDot Op = "final dot"
	OpBdat     Op = "BDAT"
	OpQuit     Op = "QUIT"
)

// EnhancedCode is an enhanced status code (RFC 3463): class, subject and detail.
type EnhancedCode [3]int

// String returns a text such as "5.1.1", and "" for the zero value.
func (c EnhancedCode) String() string {
	if c == (EnhancedCode{}) {
		return ""
	}
	return fmt.Sprintf("%d.%d.%d", c[0], c[1], c[2])
}

// Reply is an answer of the relay (RFC 5321, 4.2).
type Reply struct {
	Code         int          // three digits, as they came
	EnhancedCode EnhancedCode // of RFC 3463; zero where the relay gave none

	// Message is the text, without the enhanced code; the lines of a multiline reply are joined by "\n". What a relay repeats
	// of the credentials is replaced by "[redacted]". Else these are its raw words, control characters included: see String.
	Message string
}

// String returns the reply on one line of printable characters, with the relay's words as a Go string literal, as in
// `550 5.1.1 "no such user"`. Words of more than a kilobyte are cut, and "..." follows the closing quote.
func (r Reply) String() string {
	return wire.Reply{Code: r.Code, Enhanced: r.EnhancedCode, Text: r.Message}.String()
}

func publicReply(r wire.Reply) Reply {
	return Reply{Code: r.Code, EnhancedCode: EnhancedCode(r.Enhanced), Message: r.Text}
}

// Error is the error of every call that fails, whatever the cause. It is a net.Error. errors.As also finds in it an
// *smtp.SMTPError of go-smtp and a *textproto.Error, as net/smtp returns, if the relay has given a reply; errors.Is finds
// ErrClosed and the context's error.
type Error struct {
	// Op is the step that failed, and Reply the relay's answer to it; its Code is 0 where there was none.
	Op Op
	Reply

	// Outcome tells whether the message may be sent again. It is Accepted where the relay took the message for some
	// recipients: those who did not get it are in Refused. It is Unknown if that is the fate of one recipient at least;
	// the Receipt tells of each.
	Outcome Outcome

	// Refused are the recipients who were refused, and those whose fate is unknown, as the Outcome of each says; in the
	// envelope's order. It is empty where the relay's answer was to the message as a whole.
	Refused []RecipientError

	// Attempts counts the tries that were made, connections that could not be opened included.
	Attempts int

	// Err is the cause where it is not a reply: a network error, the context's, that of Body.WriteTo.
	Err error

	subject   string // what Op was about: an address
	permanent bool   // another try cannot help although no 5xx reply says so
	unproven  bool   // it was said in the clear where TLS is required, by the relay or by somebody on the way
}

// RecipientError tells of one recipient for whom the message was not accepted, as far as is known.
type RecipientError struct {
	To string
	Reply
	Outcome Outcome // NotAccepted, or Unknown
	Err     error   // why the relay was not asked: it lacks an extension that the address or the options need
}

// Error returns one line of printable characters: the step and what it was about, the reply with the relay's words in quotes,
// and behind a semicolon what it means or what to do:
//
//	smtprelay: RCPT TO <b@y.example>: 550 5.1.1 "no such user"
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("smtprelay: ")
	if e.Outcome == Accepted {
		fmt.Fprintf(&b, "accepted, but not for %s: ", addresses(e.Refused))
	}
	b.WriteString(string(e.Op))
	if e.subject != "" {
		b.WriteString(" " + printable.Line(e.subject))
	}
	if e.Code != 0 {
		b.WriteString(": " + e.Reply.String())
	}
	if e.Err != nil {
		between := ": "
		if e.Code != 0 {
			between = "; "
		}
		b.WriteString(between + oneLine(e.Err))
	}
	if e.Outcome == Unknown {
		b.WriteString("; the relay may have accepted the message: sending it again may deliver it twice")
	}
	if e.Attempts > 1 {
		fmt.Fprintf(&b, " (%d attempts)", e.Attempts)
	}
	return b.String()
}

// addresses lists who was refused, not at great length.
func addresses(refused []RecipientError) string {
	const most = 3
	var list []string
	for i, r := range refused {
		if i == most {
			list = append(list, fmt.Sprintf("and %d more", len(refused)-most))
			break
		}
		list = append(list, printable.Address(r.To))
	}
	return strings.Join(list, ", ")
}

// Unwrap makes errors.Is and errors.As find the cause, and the reply in the types of other libraries.
func (e *Error) Unwrap() []error {
	var errs []error
	if e.Err != nil {
		errs = append(errs, e.Err)
	}
	if e.Code != 0 {
		text := printable.Line(e.Message) // whoever logs these types alone is safe from forged lines, too
		errs = append(errs,
			&smtp.SMTPError{Code: e.Code, EnhancedCode: smtp.EnhancedCode(e.EnhancedCode), Message: text},
			&textproto.Error{Code: e.Code, Msg: text})
	}
	return errs
}

// Temporary reports whether sending the message again later, as it is, can help. Where recipients were refused it is true
// if it can help one of them. It is false where the outcome is unknown: that message may have been accepted. It is true
// for whatever was said in the clear before TLS, where that is required: it may not have been the relay who said it.
func (e *Error) Temporary() bool { return e.unproven || !e.lasting() }

// lasting reports whether another try within the same call is of no use.
func (e *Error) lasting() bool {
	if e.permanent || e.Outcome == Unknown || errors.Is(e.Err, ErrClosed) {
		return true
	}
	if len(e.Refused) > 0 {
		for _, r := range e.Refused {
			if r.Temporary() {
				return false
			}
		}
		return true
	}
	return e.Code/100 == 5 && !e.says(tooManyConns, e.Op)
}

// oneLine is the text of err on one line. Errors that were joined stand one behind the other.
func oneLine(err error) string {
	text := err.Error()
	if joined, ok := err.(interface{ Unwrap() []error }); ok && strings.Contains(text, "\n") {
		if errs := joined.Unwrap(); len(errs) > 0 && errors.Join(errs...).Error() == text {
			lines := make([]string, len(errs))
			for i, err := range errs {
				lines[i] = oneLine(err)
			}
			text = strings.Join(lines, "; ")
		}
	}
	return printable.Line(text)
}

// clone returns a copy, since the one who is told completes it.
func (e *Error) clone() *Error {
	c := *e
	return &c
}

// Temporary reports whether the relay refused the recipient only for now. It is false where the outcome is unknown.
func (r RecipientError) Temporary() bool {
	if r.Outcome == Unknown || r.Err != nil {
		return false
	}
	return r.Code/100 == 4 || r.Code == 0 || r.says(tooManyRcpts, OpRcpt)
}

// Timeout reports whether the cause was that a step, or the whole call, took too long.
func (e *Error) Timeout() bool { return e.Err != nil && conn.IsTimeout(e.Err) }

// SafeToRetry reports whether err is the error of a Send whose message was accepted for nobody, so that sending it again
// can deliver nothing twice. Whether it can help is another question: see [Error.Temporary].
func SafeToRetry(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Outcome == NotAccepted
}
