package smtprelay

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/textproto"
	"strings"

	"github.com/emersion/go-smtp"
	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/printable"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// ErrClosed is found by errors.Is in the error of a call to a Client that was shut down or closed. [ShouldRetry] is true for it.
var ErrClosed = errors.New("client closed")

// Outcome says whether the relay has accepted a message.
type Outcome int

const (
	// Unknown: the connection was lost, or the context ended, between the end of the message and the relay's reply. The relay may
	// have accepted the message; sending it again may deliver it twice (RFC 1047). It is the zero value.
	Unknown Outcome = iota
	// Accepted: the relay has accepted the message for at least one recipient. It is now responsible for delivery or a bounce.
	Accepted
	// NotAccepted: the relay has not accepted the message for any recipient. Sending it again delivers nothing twice.
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

// EnhancedCode is an enhanced status code (RFC 3463): class, subject and detail, such as {5, 1, 1}.
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
	Code         int          // the three digits; 0 where there was no reply
	EnhancedCode EnhancedCode // zero where the relay gave none

	// Message is the text without the codes, its first 2 KB. The lines of a multiline reply are joined by "\n". Where the relay
	// repeats a part of the credentials, that is replaced by "[redacted]". Otherwise the text is as the relay sent it, control
	// characters included: use String for logs.
	Message string
}

// String returns the reply on one line of printable characters, with the relay's text as a Go string literal, as in
// `550 5.1.1 "no such user"`. Text of more than a kilobyte is cut, and "..." follows the closing quote.
func (r Reply) String() string {
	return wire.Reply{Code: r.Code, Enhanced: r.EnhancedCode, Text: r.Message}.String()
}

func publicReply(r wire.Reply) Reply {
	return Reply{Code: r.Code, EnhancedCode: EnhancedCode(r.Enhanced), Message: r.Text}
}

// Error is the error of New, Send, SendMail and Ping, whatever the cause. To decide what to do about it, use [ShouldRetry] and [RetryTo].
//
// It is a net.Error. errors.Is finds [ErrClosed], [ErrBusy], the context's error and the network's. If the relay gave a reply, errors.As
// also finds an *smtp.SMTPError of go-smtp and a *textproto.Error, as net/smtp returns.
type Error struct {
	// Op is the step that failed. Reply is the relay's reply to it; its Code is 0 where there was none.
	Op    Op
	Reply Reply

	// Outcome tells whether the relay has accepted the message. It is Unknown if it is unknown for at least one recipient, else
	// Accepted if the relay accepted the message for some recipients, else NotAccepted. Recipients has the outcome for each.
	Outcome Outcome

	// Scope tells what is at fault: recipients, the message, the relay or the caller.
	Scope Scope

	// Recipients are all recipients of the message, in the order of Message.To, each with its outcome. It is the same slice as in
	// the Receipt. It is empty where there is no message, as for New and Ping.
	Recipients []RecipientResult

	// Attempts is the number of attempts, including connections that could not be opened. It is 0 for a mistake that was found
	// before the first attempt.
	Attempts int

	// Err is the cause if it is not a reply: a network error, the context's error, the error of Body.WriteTo. Together with a
	// reply it is a hint what to do. It may be nil.
	Err error

	subject   string // the address that Op was about
	permanent bool   // a retry cannot help, although there is no 5xx reply
	unproven  bool   // the failure came without TLS where TLS is required, so an attacker may have caused it
}

// RecipientResult is the outcome of a message for one of its recipients.
type RecipientResult struct {
	To      string  // the address as in Message.To
	Reply   Reply   // the reply to RCPT, or the refusal that kept the recipient from getting the message; Code 0: none
	Outcome Outcome // Accepted, NotAccepted or Unknown
	QueueID string  // the relay's identifier of the message for this recipient; see Receipt.QueueID
	Err     error   // why no RCPT was sent: the relay lacks an extension that the address or its RcptOptions need; else nil
}

// Error returns one line of printable characters: the step and its subject, the reply with the relay's text in quotes, and after a
// semicolon what it means or what to do:
//
//	smtprelay: RCPT TO <b@y.example>: 550 5.1.1 "no such user"
//
// The text is for people and may change. It contains addresses of recipients and no secret.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("smtprelay: ")
	if e.Outcome == Accepted {
		fmt.Fprintf(&b, "accepted, but not for %s: ", missed(e.Recipients))
	}
	b.WriteString(e.Op.Text())
	if e.subject != "" {
		b.WriteString(" " + printable.Line(e.subject))
	}
	if e.Reply.Code != 0 {
		b.WriteString(": " + e.Reply.String())
	}
	if e.Err != nil {
		between := ": "
		if e.Reply.Code != 0 {
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

// missed lists the first few recipients for whom the message was not, or may not have been, accepted.
func missed(recipients []RecipientResult) string {
	var list []string
	for _, r := range recipients {
		if r.Outcome != Accepted {
			list = append(list, r.To)
		}
	}
	return addresses(list)
}

// addresses lists the first few of to.
func addresses(to []string) string {
	const most = 3
	var list []string
	for i, addr := range to {
		if i == most {
			list = append(list, fmt.Sprintf("and %d more", len(to)-most))
			break
		}
		list = append(list, printable.Address(addr))
	}
	return strings.Join(list, ", ")
}

// Unwrap makes errors.Is and errors.As find the cause, and the reply in the types of other libraries.
func (e *Error) Unwrap() []error {
	var errs []error
	if e.Err != nil {
		errs = append(errs, e.Err)
	}
	if e.Reply.Code != 0 {
		text := printable.Line(e.Reply.Message) // so that logging these types alone is safe from forged lines, too
		errs = append(errs,
			&smtp.SMTPError{Code: e.Reply.Code, EnhancedCode: smtp.EnhancedCode(e.Reply.EnhancedCode), Message: text},
			&textproto.Error{Code: e.Reply.Code, Msg: text})
	}
	return errs
}

// Temporary reports whether the failure may go away by itself: a 4xx reply, a connection that could not be opened or was lost, a
// context that ended. It is false for a 5xx reply, unless the reply came in the clear before a required TLS: an attacker may
// have sent it. It is false if the message was or may have been accepted for some recipient.
//
// It exists for net.Error. To decide about a message use [ShouldRetry], which is true for refused credentials, too.
func (e *Error) Temporary() bool {
	switch {
	case e.Scope == ScopeRecipient && len(e.Recipients) > 0:
		return e.shouldRetry()
	case e.unproven, e.Op == OpTLS, e.Op == OpSTARTTLS && e.Reply.Code == 0:
		return e.Outcome == NotAccepted // an attacker on the network may have caused it
	}
	return !e.lasting()
}

// lasting reports whether a retry within the same call is useless.
func (e *Error) lasting() bool {
	return e.permanent || e.Outcome != NotAccepted || errors.Is(e.Err, ErrClosed) ||
		e.Reply.Code/100 == 5 && !e.Reply.says(tooManyConns, e.Op)
}

// oneLine returns the text of err on one line. Joined errors are separated by semicolons.
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

// clone returns a copy: each Send completes its own error.
func (e *Error) clone() *Error {
	c := *e
	return &c
}

// Timeout reports whether the cause was a timeout: of a step ([Timeouts]) or of the context's deadline. It exists for net.Error.
func (e *Error) Timeout() bool { return e.Err != nil && conn.IsTimeout(e.Err) }

// Op is the step in which an [Error] happened, or to which a command or reply belongs. It is a short lower-case word that does not
// change between versions, for use as the label of a metric; [Op.Text] is for people. The same failure has the same Op with and
// without CHUNKING.
type Op string

const (
	OpConfig   Op = "config"   // a Config or a URL was checked
	OpCheck    Op = "check"    // the message was checked, alone or against what the relay offers
	OpWait     Op = "wait"     // waiting for a connection
	OpDial     Op = "dial"     // the network connection was opened
	OpGreeting Op = "greeting" // the relay's first reply
	OpEHLO     Op = "ehlo"     // EHLO, or HELO
	OpSTARTTLS Op = "starttls" // STARTTLS
	OpTLS      Op = "tls"      // the TLS handshake
	OpAuth     Op = "auth"     // AUTH, and each of its rounds
	OpRset     Op = "rset"     // RSET
	OpMail     Op = "mail"     // MAIL
	OpRcpt     Op = "rcpt"     // RCPT
	OpData     Op = "data"     // DATA, or BDAT for a chunk that is not the last
	OpBody     Op = "body"     // the body was written
	OpEnd      Op = "end"      // the final dot, or the last chunk: its reply decides
	OpQuit     Op = "quit"     // QUIT
)

var opTexts = map[Op]string{
	OpConfig:   "configuration",
	OpCheck:    "checking the message",
	OpWait:     "waiting for a connection",
	OpDial:     "dial",
	OpGreeting: "greeting",
	OpEHLO:     "EHLO",
	OpSTARTTLS: "STARTTLS",
	OpTLS:      "TLS handshake",
	OpAuth:     "AUTH",
	OpRset:     "RSET",
	OpMail:     "MAIL FROM",
	OpRcpt:     "RCPT TO",
	OpData:     "DATA",
	OpBody:     "sending the body",
	OpEnd:      "end of the message",
	OpQuit:     "QUIT",
}

// Text returns the step in words, as in the text of an [Error].
func (op Op) Text() string {
	if text, ok := opTexts[op]; ok {
		return text
	}
	return string(op)
}

// opOf returns the Op of a step of a connection.
func opOf(step conn.Step) Op {
	switch step {
	case conn.StepDial:
		return OpDial
	case conn.StepGreeting:
		return OpGreeting
	case conn.StepEHLO:
		return OpEHLO
	case conn.StepSTARTTLS:
		return OpSTARTTLS
	case conn.StepTLS:
		return OpTLS
	case conn.StepAuth:
		return OpAuth
	case conn.StepRset:
		return OpRset
	case conn.StepMail:
		return OpMail
	case conn.StepRcpt:
		return OpRcpt
	case conn.StepData, conn.StepBdat:
		return OpData
	case conn.StepBody:
		return OpBody
	case conn.StepFinalDot:
		return OpEnd
	case conn.StepQuit:
		return OpQuit
	}
	return Op(step)
}

// opOfCommand returns the Op of a command line as a connection traces it.
func opOfCommand(line string) Op {
	switch verb, _, _ := strings.Cut(line, " "); verb {
	case "EHLO", "HELO":
		return OpEHLO
	case "STARTTLS":
		return OpSTARTTLS
	case "AUTH", redacted, "*":
		return OpAuth
	case "RSET":
		return OpRset
	case "MAIL":
		return OpMail
	case "RCPT":
		return OpRcpt
	case "BDAT":
		if strings.HasSuffix(line, " LAST") {
			return OpEnd
		}
		return OpData
	case "DATA":
		return OpData
	case ".":
		return OpEnd
	}
	return OpQuit
}

func errClosed() *Error {
	return &Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeCaller, Err: ErrClosed, permanent: true}
}

// Printing.

// LogValue implements slog.LogValuer: the text, and the step, outcome, scope, code and attempts as attributes.
func (e *Error) LogValue() slog.Value {
	return slog.GroupValue(append([]slog.Attr{slog.String("text", e.Error())}, e.attrs()...)...)
}

func (e *Error) attrs() []slog.Attr {
	attrs := []slog.Attr{slog.String("step", string(e.Op)), slog.String("outcome", e.Outcome.String()), slog.String("scope", e.Scope.String())}
	if e.Reply.Code != 0 {
		attrs = append(attrs, slog.Int("code", e.Reply.Code))
	}
	return append(attrs, slog.Int("attempts", e.Attempts))
}

// String returns the recipient, the outcome and the reply on one line of printable characters.
func (r RecipientResult) String() string {
	s := printable.Address(r.To) + " " + r.Outcome.String()
	if r.Reply.Code != 0 {
		s += ": " + r.Reply.String()
	}
	return s
}

// String returns the final reply, the identifier and the outcome for the first few recipients, on one line of printable characters.
func (r Receipt) String() string {
	var parts []string
	if r.Reply.Code != 0 {
		parts = append(parts, r.Reply.String())
	}
	if r.QueueID != "" {
		parts = append(parts, "queue ID "+printable.Line(r.QueueID))
	}
	for _, outcome := range []Outcome{Accepted, NotAccepted, Unknown} {
		var to []string
		for _, rcpt := range r.Recipients {
			if rcpt.Outcome == outcome {
				to = append(to, rcpt.To)
			}
		}
		if len(to) > 0 {
			parts = append(parts, outcome.String()+" for "+addresses(to))
		}
	}
	return strings.Join(parts, "; ")
}

// LogValue implements slog.LogValuer: the code, the identifier, and how many recipients had which outcome.
func (r Receipt) LogValue() slog.Value {
	var n [3]int
	for _, rcpt := range r.Recipients {
		if o := rcpt.Outcome; o >= 0 && int(o) < len(n) {
			n[o]++
		}
	}
	return slog.GroupValue(slog.Int("code", r.Reply.Code), slog.String("queue_id", printable.Line(r.QueueID)),
		slog.Int("accepted", n[Accepted]), slog.Int("not_accepted", n[NotAccepted]), slog.Int("unknown", n[Unknown]))
}

// String returns the envelope, with the first few recipients, on one line of printable characters.
func (m Message) String() string {
	return "from " + m.sender() + " to " + addresses(m.To)
}

func (m Message) sender() string {
	if m.From == NullSender {
		return NullSender
	}
	return printable.Address(m.From)
}

// Format implements fmt.Formatter: with every verb it prints what String returns.
func (m Message) Format(f fmt.State, _ rune) { io.WriteString(f, m.String()) }

// LogValue implements slog.LogValuer: the envelope.
func (m Message) LogValue() slog.Value {
	return slog.GroupValue(slog.String("from", m.sender()), slog.String("to", addresses(m.To)))
}

// String returns the envelope, and the receipt or the error, on one line of printable characters.
func (r Result) String() string {
	if r.Err != nil {
		return r.Message.String() + ": " + oneLine(r.Err)
	}
	return r.Message.String() + ": " + r.Receipt.String()
}

// LogValue implements slog.LogValuer: the envelope, and the receipt or the error.
func (r Result) LogValue() slog.Value {
	attrs := []slog.Attr{slog.Any("message", r.Message), slog.String("outcome", OutcomeOf(r.Err).String())}
	if r.Err != nil {
		return slog.GroupValue(append(attrs, slog.Any("err", r.Err))...)
	}
	return slog.GroupValue(append(attrs, slog.Any("receipt", r.Receipt))...)
}
