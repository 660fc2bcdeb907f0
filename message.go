package smtprelay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/mail"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay/internal/body"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// NullSender in Message.From is the empty envelope sender, "<>" (RFC 5321, 4.5.5). Use it for bounces and automatic replies, for which
// no relay shall send a bounce.
const NullSender = "<>"

// Message is a mail and its envelope. Send does not change it, so that it may be sent again. Printing it, with any verb or through
// log/slog, shows the envelope and never the body.
type Message struct {
	// From is the envelope sender (Return-Path), to which relays send bounces: a bare address such as "shop@example.com", or
	// [NullSender]. Empty is an error. It has at most 254 bytes, 64 of them before the @ (RFC 5321, 4.5.3.1). Angle brackets, control
	// characters and invisible characters are errors, in a quoted local part too: a relay with a simple parser could read a parameter
	// or another address in them. See [ParseAddresses] for addresses with names.
	From string

	// To lists the envelope recipients, at least one, as bare addresses under the same rules as From. Every address in To gets the
	// message, whatever its header says: put a Bcc recipient here and leave it out of the header.
	To []string

	// Body writes the mail as RFC 5322 has it: header, empty line, text. [Bytes], [BodyFunc] and [Reader] make one; a *mail.Msg of
	// wneessen/go-mail and a *gomail.Message are one. It may be of any size: the Client uses constant memory.
	//
	// The Client turns bare CR and bare LF into CRLF and escapes lines that begin with a dot. It changes and adds nothing else: no Date,
	// no Message-ID. It sends 8-bit text to a relay without 8BITMIME too (MailOptions.Body can make that an error), and lines of more
	// than 998 bytes, which some relays refuse (RFC 5321, 4.5.3.1.6).
	//
	// WriteTo is called again for each attempt, from one goroutine at a time. A Body that is also an io.Reader is treated as by
	// [Reader]: a Body that can seek, and a *bytes.Buffer, can be written again; any other only once. Its Read and its WriteTo must
	// give the same bytes. If the Body returns an error or writes nothing at all, the relay accepts nothing.
	Body io.WriterTo

	// AllOrNothing sends the message to no recipient if the relay refuses one of them. By default the accepted recipients get it
	// and the error names the others. It needs a single transaction: more recipients than the relay takes in one are an error.
	// With several recipients it costs an additional round trip.
	AllOrNothing bool

	// Urgent messages are served before others that wait for a connection. One in eight turns still goes to the others.
	Urgent bool

	// FailFast makes Send return the error of the last attempt to connect if no connection works and the relay cannot be reached.
	// By default Send waits, up to Timeouts.Outage. If connections work but are busy, Send waits in any case.
	FailFast bool

	// MailOptions are parameters of the MAIL command: delivery status notifications, REQUIRETLS and others. nil means none.
	MailOptions *MailOptions

	// RcptOptions are parameters of the RCPT command, by address as it is written in To. An address that is not in To is an error.
	RcptOptions map[string]*RcptOptions

	// BeforeEnd, if not nil, is called after the body is written and before the end of the message, the final dot or BDAT 0
	// LAST, is sent. The relay cannot accept the message before BeforeEnd has returned nil. A queue can record there, durably,
	// that the message may have been sent. to lists the recipients of the transaction. Send calls BeforeEnd once per
	// transaction: several times if it splits the recipients, and again if it retries. Send calls it in its own goroutine, and
	// never after Send has returned.
	//
	// No other message can use the connection meanwhile, so BeforeEnd should be quick. Its ctx is derived from that of Send and
	// also ends when the connection is lost; BeforeEnd should return then.
	//
	// An error from BeforeEnd closes the connection without the end of the message, and Send does not retry. The error of Send
	// wraps it and has [NotAccepted], Op [OpEnd] and [ScopeCaller]; if the relay has refused all recipients meanwhile, it is
	// that refusal.
	BeforeEnd func(ctx context.Context, to []string) error

	// Tag is a value of the caller, such as the key of a database row. The Client does not use it. It is in the Message of a
	// [Result] and of a [Trace]'s Infos.
	Tag any
}

// Bytes returns a Body that writes b. b must not change until Send has returned. Its size is declared to a relay that offers SIZE
// (RFC 1870).
func Bytes(b []byte) io.WriterTo { return body.Bytes(b) }

// BodyFunc returns a Body that f writes, for text that is generated while it is sent: a template or an archive. f is called
// again for each attempt, and for each transaction if the recipients are split, from one goroutine at a time, and must write the
// same bytes each time. An error of f ends the Send: the relay accepts nothing, and the error is found by errors.Is. f must not
// use w after it has returned. BodyFunc(nil) is nil, which Send refuses.
func BodyFunc(f func(w io.Writer) error) io.WriterTo {
	if f == nil {
		return nil
	}
	return body.Func(f)
}

// Reader returns a Body that copies r from where r stands when Send is called.
//
// An r that can seek (*os.File, *bytes.Reader, *strings.Reader, any io.Seeker whose Seek succeeds) is read again from that
// offset for each attempt, and has that offset again when Send returns. A *bytes.Buffer is read in place and is not emptied.
// Such an r must not change until Send has returned. Files and readers in memory may be shared by messages that are sent at the
// same time; another io.Seeker may not.
//
// Any other r, such as a pipe or the body of an HTTP request, can be read only once: if an attempt fails after the first read, the
// message is not retried and the error says so. For the same reason a message whose recipients do not fit into one transaction is
// refused. With Config.Chunking and a relay that offers CHUNKING (RFC 3030), up to 64 KiB are read before the envelope is sent, and
// kept: the message can be retried until more than that was read.
func Reader(r io.Reader) io.WriterTo { return body.Reader(r) }

// Receipt is the relay's answer to a message that it accepted for at least one recipient. Send also returns a Receipt with an
// error: its Recipients are then those of the Error.
type Receipt struct {
	// Reply is the relay's reply to the end of the message. If the recipients were split over several transactions, it is that
	// of the last accepted transaction. Its Code is 0 if none was accepted.
	Reply Reply

	// QueueID is the relay's identifier of the message, found in Reply. Name it when you ask the relay's operator about the
	// message. It is empty if none was recognised. The relay chooses it: at most 128 characters of printable ASCII.
	QueueID string

	// Recipients has the outcome for each recipient, in the order of Message.To.
	Recipients []RecipientResult
}

// MailOptions are parameters of the MAIL command, which apply to the message as a whole. A zero field leaves its parameter out. A value
// out of range is an error of the Send, and so is an option whose extension the relay does not offer, unless the field says
// otherwise. In both cases the message is not sent.
type MailOptions struct {
	// Body declares what bytes the message consists of (RFC 6152). Empty means 8BITMIME where the relay offers it, and no declaration
	// elsewhere.
	Body BodyType

	// Size is the size in bytes that is declared to the relay (RFC 1870). It must not be negative. 0 means the size of the
	// message if it is known beforehand, as for [Bytes]. It is left out if the relay does not offer SIZE.
	Size int64

	// RequireTLS asks every relay on the way to pass the message on over verified TLS or not at all (RFC 8689). It is an error on a
	// connection without TLS or where TLSConfig turns verification off.
	RequireTLS bool

	// UTF8 declares that the header contains UTF-8 (RFC 6531). The Client sets it where an envelope address is not ASCII.
	UTF8 bool

	// Return says how much of the message a delivery status notification contains (RFC 3461, 4.3). Empty means the relay's choice.
	Return DSNReturn

	// EnvelopeID is repeated in delivery status notifications (RFC 3461, 4.4), so that you know which message they are about. It has at
	// most 100 printable ASCII characters.
	EnvelopeID string

	// Auth points to the address of the original submitter of the message, without angle brackets (RFC 4954, 5), or to "" if
	// that is unknown. nil leaves it out. It is also left out if the relay does not offer AUTH.
	Auth *string

	// DeliverBy is a time limit for the delivery (RFC 2852); nil means none.
	DeliverBy *DeliverBy

	// Priority points to the message's priority for the relays on its way, from -9, the lowest, to 9 (RFC 6710); nil means none. For the
	// order within this Client see Message.Urgent.
	Priority *int
}

// BodyType is the value of BODY= (RFC 6152, RFC 3030).
type BodyType string

const (
	Body7Bit       BodyType = "7BIT"
	Body8BitMIME   BodyType = "8BITMIME"
	BodyBinaryMIME BodyType = "BINARYMIME" // an error: line ends are normalised, so that a message is always sent as text
)

// DSNReturn is the value of RET= (RFC 3461, 4.3).
type DSNReturn string

const (
	DSNReturnFull    DSNReturn = "FULL" // the whole message
	DSNReturnHeaders DSNReturn = "HDRS" // its header only
)

// DeliverBy is the value of BY= (RFC 2852, 4).
type DeliverBy struct {
	// Time is the limit, counted from when the message is sent, in whole seconds: a fraction is dropped. It is at most 999,999,999
	// seconds. With DeliverByReturn it is at least one second, and at least the minimum in the relay's EHLO reply. With
	// DeliverByNotify it may be negative.
	Time time.Duration

	// Mode says what happens when Time is over. It must be set.
	Mode DeliverByMode

	// Trace asks every relay for a notification when it passes the message on.
	Trace bool
}

// DeliverByMode is what happens to a message that is not delivered in time (RFC 2852, 4).
type DeliverByMode string

const (
	DeliverByNotify DeliverByMode = "N" // the sender is notified, and delivery goes on
	DeliverByReturn DeliverByMode = "R" // the message is returned to the sender
)

// RcptOptions are parameters of the RCPT command, which apply to one recipient. A zero field leaves its parameter out. A value out of
// range is an error of the Send, and nothing is sent. Where the relay does not offer the extension of an option, the message is not sent
// to that recipient (RecipientResult.Err says why). It is not sent at all if there is no other recipient or AllOrNothing is set.
type RcptOptions struct {
	// Notify lists the events for which the sender gets a delivery status notification (RFC 3461, 4.1): DSNNotifyNever alone, or any of
	// the others. Empty means the relay's choice, which is to notify of failures.
	Notify []DSNNotify

	// OriginalRecipient is the address to which the message was sent first (RFC 3461, 4.2): at most 500 bytes of printable ASCII, or of
	// UTF-8 (RFC 6533) with the type DSNAddressTypeUTF8. An empty type means DSNAddressTypeRFC822.
	OriginalRecipientType DSNAddressType
	OriginalRecipient     string

	// RequireRecipientValidSince asks for delivery only if the mailbox has had the same owner since then (RFC 7293). It is sent
	// in UTC with whole seconds. Its year is from 1 to 9999.
	RequireRecipientValidSince time.Time
}

// DSNNotify is one of the values of NOTIFY= (RFC 3461, 4.1).
type DSNNotify string

const (
	DSNNotifyNever   DSNNotify = "NEVER"
	DSNNotifyDelayed DSNNotify = "DELAY"
	DSNNotifyFailure DSNNotify = "FAILURE"
	DSNNotifySuccess DSNNotify = "SUCCESS"
)

// DSNAddressType is the type of an address in ORCPT= (RFC 3461, 4.2; RFC 6533, 3).
type DSNAddressType string

const (
	DSNAddressTypeRFC822 DSNAddressType = "RFC822"
	DSNAddressTypeUTF8   DSNAddressType = "UTF-8"
)

// params returns the parameters of MAIL in the form of package wire.
func (o *MailOptions) params() wire.MailParams {
	p := wire.MailParams{Body: string(o.Body), Size: o.Size, UTF8: o.UTF8, Return: string(o.Return), EnvelopeID: o.EnvelopeID,
		RequireTLS: o.RequireTLS, Auth: o.Auth, Priority: o.Priority}
	if by := o.DeliverBy; by != nil {
		p.By = wire.By{Mode: string(by.Mode), Seconds: by.seconds(), Trace: by.Trace}
	}
	return p
}

// params returns the parameters of RCPT in the form of package wire. o may be nil.
func (o *RcptOptions) params() (p wire.RcptParams) {
	if o == nil {
		return p
	}
	p = wire.RcptParams{OrcptAs: string(o.OriginalRecipientType), Orcpt: o.OriginalRecipient, Since: o.RequireRecipientValidSince}
	for _, n := range o.Notify {
		p.Notify = append(p.Notify, string(n))
	}
	return p
}

// needsDSN and needsRRVS report whether o needs the extension. o may be nil.
func (o *RcptOptions) needsDSN() bool {
	return o != nil && (len(o.Notify) > 0 || o.OriginalRecipient != "")
}

func (o *RcptOptions) needsRRVS() bool { return o != nil && !o.RequireRecipientValidSince.IsZero() }

func (by *DeliverBy) seconds() int64 { return int64(by.Time / time.Second) }

// ParseAddresses returns the bare addresses in list, for From and To of a [Message]. Each element is the value of a header field such as
// To or Cc: any number of addresses, with or without display names (RFC 5322, 3.4). Empty elements and empty groups are skipped. Order
// and duplicates are kept.
//
// The error is an *[Error] that names every element that cannot be parsed; the result is then nil.
func ParseAddresses(list ...string) ([]string, error) {
	// A display name in an unknown character set is no reason to refuse the address.
	anyCharset := &mime.WordDecoder{CharsetReader: func(_ string, input io.Reader) (io.Reader, error) { return input, nil }}
	parser := mail.AddressParser{WordDecoder: anyCharset}
	var addrs []string
	var mistakes []error
	for _, header := range list {
		if strings.TrimSpace(header) == "" {
			continue
		}
		parsed, err := parser.ParseList(header)
		if err != nil {
			mistakes = append(mistakes, fmt.Errorf("addresses %s: %s", quoted(header), strings.TrimPrefix(err.Error(), "mail: ")))
		}
		for _, a := range parsed {
			// The parser takes the quotes from "ann smith"@example.org, and String puts them back.
			addr := withoutBrackets((&mail.Address{Address: a.Address}).String())
			if err := checkPath(addr); err != nil {
				mistakes = append(mistakes, fmt.Errorf("address %s: %w", quoted(addr), err))
			}
			addrs = append(addrs, addr)
		}
	}
	if len(mistakes) > 0 {
		return nil, &Error{Op: OpCheck, Outcome: NotAccepted, Scope: ScopeMessage, Err: errors.Join(mistakes...), permanent: true}
	}
	return addrs, nil
}

// GoMail is a message with an envelope. A *mail.Msg of github.com/wneessen/go-mail implements it.
type GoMail interface {
	io.WriterTo
	GetSender(useFullAddr bool) (string, error) // the envelope sender, with or without angle brackets
	GetRecipients() ([]string, error)           // all envelope recipients, including Bcc
}

// MessageOf returns a Message with m as its Body and m's own envelope: its sender, and each of its recipients (To, Cc, Bcc) once. m
// must not change until Send has returned. The error is an *[Error] with [OpCheck] that wraps m's, if it has no sender or no recipients.
func MessageOf(m GoMail) (Message, error) {
	from, err := m.GetSender(false)
	if err == nil {
		var to []string
		if to, err = m.GetRecipients(); err == nil {
			return Message{From: withoutBrackets(from), To: onceEach(to), Body: m}, nil
		}
	}
	if e, ok := errors.AsType[*Error](err); ok { // such as one of ParseAddresses
		return Message{}, e
	}
	return Message{}, &Error{Op: OpCheck, Outcome: NotAccepted, Scope: ScopeMessage, Err: err, permanent: true}
}

// onceEach returns the addresses of to without angle brackets and without duplicates, in their order.
func onceEach(to []string) []string {
	addrs, seen := make([]string, 0, len(to)), make(map[string]bool, len(to))
	for _, addr := range to {
		if addr = withoutBrackets(addr); !seen[addr] {
			seen[addr] = true
			addrs = append(addrs, addr)
		}
	}
	return addrs
}

// withoutBrackets returns addr without surrounding angle brackets.
func withoutBrackets(addr string) string {
	if addr == NullSender {
		return addr
	}
	if inner, ok := strings.CutPrefix(addr, "<"); ok {
		if inner, ok = strings.CutSuffix(inner, ">"); ok {
			return inner
		}
	}
	return addr
}
