package smtprelay

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/emersion/go-smtp"

	"github.com/smtprelay/smtprelay/internal/wire"
)

// Message is a mail and its envelope.
type Message struct {
	// From is the reverse-path, to which the relay reports failures: an address without angle brackets or display name,
	// or "" for the null reverse-path <> (RFC 5321, 4.5.5).
	From string

	// To holds the forward-paths, at least one, like From without brackets or display names. The header of the message is
	// not looked at: who is to have a blind copy stands here and not there.
	To []string

	// Body writes the message as RFC 5322 has it: header, empty line, text. Bare CR and bare LF become CRLF on the way and
	// lines that begin with a dot are escaped, in constant memory. Nothing else is changed or added: no Date, no Message-ID;
	// 8-bit text goes to a relay without 8BITMIME too (MailOptions.Body can make that an error), and so do lines of more than
	// 998 octets, which some relays refuse (RFC 5321, 4.5.3.1.6). [Bytes] and [Reader] make one; a *mail.Msg of
	// wneessen/go-mail or a *gomail.Message is one.
	//
	// WriteTo may be called again for another try, from one goroutine at a time. A Body that is also an io.Reader, such as
	// a *bytes.Buffer, is used up by writing: a message whose Body was asked to write is not tried again, but for what
	// [Reader] says of CHUNKING. Its Read and its WriteTo must tell the same, as for io.Copy. If either fails, or there is
	// nothing at all to write, nothing is accepted by the relay.
	Body io.WriterTo

	// AllOrNothing sends the message to nobody if the relay refuses one of several recipients. By default those who were
	// accepted get it, and the error names the others.
	AllOrNothing bool

	// MailOptions are the parameters of the MAIL command. Those that the relay does not offer are an error before
	// anything is sent. Size is filled in where it is 0 and the size of Body is known.
	MailOptions *smtp.MailOptions

	// RcptOptions are the parameters of the RCPT command, by address as it stands in To. DeliverBy and MTPriority, which
	// belong to MAIL (RFC 2852, RFC 6710), must be the same for every recipient.
	RcptOptions map[string]*smtp.RcptOptions
}

// Bytes returns a Body that writes b, which must not change until Send has returned.
func Bytes(b []byte) io.WriterTo { return bytesBody(b) }

// Reader returns a Body that copies r. It can be written once only: if a try fails after the body was begun, the message
// is not tried again. Where the relay offers CHUNKING (RFC 3030) up to 64 KiB are read before the relay is asked, and kept:
// there it is tried again until more than that was read.
func Reader(r io.Reader) io.WriterTo { return &readerBody{r: r} }

type bytesBody []byte

func (b bytesBody) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(b)
	return int64(n), err
}

type readerBody struct{ r io.Reader }

// Read makes it an io.Reader too, which is how a Body says that it is used up by writing.
func (b *readerBody) Read(p []byte) (int, error) { return b.r.Read(p) }

func (b *readerBody) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, struct{ io.Reader }{b.r}) // not the reader's own WriteTo, which could write past the io.Writer given
}

// oneShot reports whether b is used up by writing.
func oneShot(b io.WriterTo) bool {
	if h, ok := b.(*headedBody); ok {
		return h.used
	}
	_, ok := b.(io.Reader)
	return ok
}

// Receipt is what the relay said when it accepted a message.
type Receipt struct {
	// Reply is the relay's final reply as it came. Where recipients had to be split over several transactions it is that
	// of the last one accepted.
	Reply

	// QueueID is the identifier that the reply names, the only handle a relay gives for asking about the message later;
	// empty where none was recognised.
	QueueID string

	// Recipients tells each recipient's fate, in the envelope's order.
	Recipients []RecipientReceipt
}

// RecipientReceipt is one recipient's part of a [Receipt].
type RecipientReceipt struct {
	To      string
	Reply           // to RCPT, or of what kept the recipient from being named to the relay
	Outcome Outcome // Accepted, NotAccepted or Unknown
	QueueID string  // of the transaction this recipient was in
}

// begin checks the message and fills in what the delivery needs to know of it.
func (d *delivery) begin() error {
	if err := ended(d.ctx); err != nil {
		return &Error{Op: OpCheck, Outcome: NotAccepted, Err: err}
	}
	if err := d.m.check(); err != nil {
		return &Error{Op: OpCheck, Outcome: NotAccepted, Err: err, permanent: true}
	}
	if d.m.MailOptions != nil {
		d.mail = *d.m.MailOptions
	}
	if !isASCII(d.m.From) {
		d.utf8 = d.m.From
	} else if i := slices.IndexFunc(d.m.To, func(to string) bool { return !isASCII(to) }); i >= 0 {
		d.utf8 = d.m.To[i]
	}
	d.size = canonicalSize(d.m)
	d.todo = make([]int, len(d.m.To))
	d.receipt.Recipients = make([]RecipientReceipt, len(d.m.To))
	for i, to := range d.m.To {
		d.todo[i] = i
		d.receipt.Recipients[i] = RecipientReceipt{To: to, Outcome: NotAccepted}
	}
	return nil
}

// canonicalSize is the size of a body that is known before it is written, or 0.
func canonicalSize(m *Message) int64 {
	if b, ok := m.Body.(bytesBody); ok {
		return wire.CanonicalSize(b)
	}
	return 0
}

// check finds all mistakes in m that can be found without a relay.
func (m *Message) check() error {
	var mistakes []error
	mistake := func(format string, args ...any) { mistakes = append(mistakes, fmt.Errorf(format, args...)) }
	if m.From != "" {
		if err := checkPath(m.From); err != nil {
			mistake("From %q: %w", m.From, err)
		}
	}
	if len(m.To) == 0 {
		mistake("To is empty: no recipients")
	}
	for _, to := range m.To {
		if strings.EqualFold(to, "postmaster") {
			continue // the only forward-path without a domain (RFC 5321, 4.1.1.3)
		}
		if err := checkPath(to); err != nil {
			mistake("To %q: %w", to, err)
		}
	}
	if m.Body == nil {
		mistake("Body is nil")
	} else if b, ok := m.Body.(bytesBody); ok && len(b) == 0 {
		mistakes = append(mistakes, errEmptyBody)
	}
	if o := m.MailOptions; o != nil {
		mistakes = append(mistakes, checkMailOptions(o)...)
	}
	for to, o := range m.RcptOptions {
		if !slices.Contains(m.To, to) {
			mistake("RcptOptions for %q, who is not in To", to)
		}
		if o != nil {
			for _, err := range checkRcptOptions(o) {
				mistake("RcptOptions of %q: %w", to, err)
			}
		}
	}
	for _, to := range m.To {
		if !sameUrgency(m.RcptOptions[to], m.RcptOptions[m.To[0]]) {
			mistake("RcptOptions: DeliverBy and MTPriority of %q differ from those of %q; they are said once for all, with MAIL", to, m.To[0])
			break
		}
	}
	return errors.Join(mistakes...)
}

// sameUrgency reports whether a and b, which may be nil, have the same parameters of MAIL.
func sameUrgency(a, b *smtp.RcptOptions) bool {
	none := &smtp.RcptOptions{}
	a, b = cmp.Or(a, none), cmp.Or(b, none)
	return same(a.DeliverBy, b.DeliverBy) && same(a.MTPriority, b.MTPriority)
}

func same[T comparable](a, b *T) bool { return a == b || a != nil && b != nil && *a == *b }

// checkPath reports what is wrong with an address as a reverse-path or forward-path (RFC 5321, 4.1.2 and 4.5.3.1). It is
// strict in what could be read as more than an address, and lenient in what relays exist for: dots in odd places.
func checkPath(addr string) error {
	switch i := strings.IndexFunc(addr, func(r rune) bool { return r < ' ' || r == 0x7f }); {
	case addr == "":
		return errors.New("the address is empty")
	case i >= 0:
		return fmt.Errorf("control character %q", addr[i])
	case !utf8.ValidString(addr):
		return errors.New("not valid UTF-8")
	case strings.ContainsAny(addr, "<>") && !strings.HasPrefix(addr, `"`):
		return errors.New("want the address alone, without angle brackets or display name")
	case len(addr) > 254:
		return fmt.Errorf("%d octets, more than 254", len(addr))
	}
	at := strings.LastIndexByte(addr, '@')
	if at < 0 {
		return errors.New("no @")
	}
	local, domain := addr[:at], addr[at+1:]
	if local == "" || len(local) > 64 {
		return fmt.Errorf("the part before @ has %d octets: want 1 to 64", len(local))
	}
	if strings.HasPrefix(local, `"`) {
		if !validQuoted(local) {
			return errors.New("the quoted part before @ is not ended, or something stands behind it")
		}
	} else if i := strings.IndexAny(local, "()<>[]:;@\\,\" "); i >= 0 {
		return fmt.Errorf("character %q before @", local[i])
	}
	if strings.HasPrefix(domain, "[") {
		if !validLiteral(domain) {
			return fmt.Errorf("domain %q is not an address literal", domain)
		}
		return nil
	}
	if !validDomain(asciiDomain(domain)) {
		return fmt.Errorf("%q is not a domain name", domain)
	}
	return nil
}

// validQuoted reports whether s is a quoted string (RFC 5321, 4.1.2).
func validQuoted(s string) bool {
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case '"':
			return i == len(s)-1 && i > 1
		}
	}
	return false
}

// asciiDomain puts a letter in the place of each character that is not ASCII: labels of SMTPUTF8 (RFC 6531, 3.3) are
// checked in their form only.
func asciiDomain(domain string) string {
	return strings.Map(func(r rune) rune {
		if r >= utf8.RuneSelf {
			return 'x'
		}
		return r
	}, domain)
}

func isASCII(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r >= utf8.RuneSelf }) < 0
}

func isPrintable(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r >= 0x7f }) < 0
}

func checkMailOptions(o *smtp.MailOptions) (mistakes []error) {
	mistake := func(format string, args ...any) {
		mistakes = append(mistakes, fmt.Errorf("MailOptions."+format, args...))
	}
	switch o.Body {
	case "", smtp.Body7Bit, smtp.Body8BitMIME:
	case smtp.BodyBinaryMIME:
		mistake("Body BINARYMIME: the message is sent as text")
	default:
		mistake("Body %q is unknown", o.Body)
	}
	if o.Size < 0 {
		mistake("Size is negative")
	}
	switch o.Return {
	case "", smtp.DSNReturnFull, smtp.DSNReturnHeaders:
	default:
		mistake("Return %q: want FULL or HDRS", o.Return)
	}
	if len(o.EnvelopeID) > 100 || !isPrintable(o.EnvelopeID) {
		mistake("EnvelopeID: want at most 100 printable ASCII characters (RFC 3461, 4.4)")
	}
	if o.Auth != nil && *o.Auth != "" {
		if err := checkPath(*o.Auth); err != nil {
			mistake("Auth %q: %w", *o.Auth, err)
		}
	}
	return mistakes
}

func checkRcptOptions(o *smtp.RcptOptions) (mistakes []error) {
	mistake := func(format string, args ...any) { mistakes = append(mistakes, fmt.Errorf(format, args...)) }
	for i, n := range o.Notify {
		switch n {
		case smtp.DSNNotifyNever:
			if len(o.Notify) > 1 {
				mistake("Notify: NEVER stands alone (RFC 3461, 4.1)")
			}
		case smtp.DSNNotifyDelayed, smtp.DSNNotifyFailure, smtp.DSNNotifySuccess:
			if slices.Contains(o.Notify[:i], n) {
				mistake("Notify: %s stands twice", n)
			}
		default:
			mistake("Notify %q is unknown", n)
		}
	}
	switch o.OriginalRecipientType {
	case "", smtp.DSNAddressTypeRFC822:
		if !isPrintable(o.OriginalRecipient) {
			mistake("OriginalRecipient %q is not printable ASCII; its type may be UTF-8", o.OriginalRecipient)
		}
	case smtp.DSNAddressTypeUTF8:
		if !utf8.ValidString(o.OriginalRecipient) {
			mistake("OriginalRecipient is not valid UTF-8")
		}
		if strings.ContainsFunc(o.OriginalRecipient, unicode.IsControl) {
			mistake("OriginalRecipient %q has a control character in it", o.OriginalRecipient)
		}
	default:
		mistake("OriginalRecipientType %q is unknown", o.OriginalRecipientType)
	}
	if len(o.OriginalRecipient) > 500 {
		mistake("OriginalRecipient has more than 500 octets (RFC 3461, 4.2)")
	}
	if by := o.DeliverBy; by != nil {
		if by.Mode != smtp.DeliverByNotify && by.Mode != smtp.DeliverByReturn {
			mistake("DeliverBy.Mode %q: want N or R", by.Mode)
		}
		if by.Mode == smtp.DeliverByReturn && by.Time < time.Second {
			mistake("DeliverBy.Time must be a second at least with mode R (RFC 2852, 4)")
		}
	}
	if p := o.MTPriority; p != nil && (*p < -9 || *p > 9) {
		mistake("MTPriority is %d: want -9 to 9", *p)
	}
	return mistakes
}
