package smtprelay

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/smtprelay/smtprelay/internal/printable"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// Message is a mail and its envelope.
type Message struct {
	// From is the reverse-path, to which the relay reports failures: an address without angle brackets or display name,
	// or "" for the null reverse-path <> (RFC 5321, 4.5.5). It has at most 254 octets, 64 of them before @ (RFC 5321,
	// 4.5.3.1). Angle brackets, control and invisible characters are an error, in quotes too: a relay with a simple parser
	// could read a parameter in them, or another address.
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

	// MailOptions are further parameters of the MAIL command; nil means none.
	MailOptions *MailOptions

	// RcptOptions are further parameters of the RCPT command, by address as it stands in To.
	RcptOptions map[string]*RcptOptions
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
	// empty where none was recognised. It has at most 128 characters, of printable ASCII; the relay chooses them.
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
	if len(d.m.To) > 1 {
		d.rcpts = d.c.cfg.learnt.maxRcpts()
	}
	d.todo = make([]int, len(d.m.To))
	d.receipt.Recipients = make([]RecipientReceipt, len(d.m.To))
	for i, to := range d.m.To {
		d.todo[i] = i
		d.receipt.Recipients[i] = RecipientReceipt{To: to, Outcome: NotAccepted}
		if o := d.m.RcptOptions[to]; o != nil {
			if d.dsnFor == "" && (len(o.Notify) > 0 || o.OriginalRecipient != "") {
				d.dsnFor = to
			}
			if d.rrvsFor == "" && !o.RequireRecipientValidSince.IsZero() {
				d.rrvsFor = to
			}
		}
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

// quoted is a text of the caller's, or one of his users, as it stands in an error.
func quoted[T ~string](text T) string { return printable.Quote(string(text), printable.MostAddress) }

// check finds all mistakes in m that can be found without a relay.
func (m *Message) check() error {
	var mistakes []error
	mistake := func(format string, args ...any) { mistakes = append(mistakes, fmt.Errorf(format, args...)) }
	if m.From != "" {
		if err := checkPath(m.From); err != nil {
			mistake("From %s: %w", quoted(m.From), err)
		}
	}
	if len(m.To) == 0 {
		mistake("To is empty: no recipients")
	}
	for _, to := range m.To {
		if isASCII(to) && strings.EqualFold(to, "postmaster") {
			continue // the only forward-path without a domain (RFC 5321, 4.1.1.3)
		}
		if err := checkPath(to); err != nil {
			mistake("To %s: %w", quoted(to), err)
		}
	}
	if m.Body == nil {
		mistake("Body is nil")
	} else if b, ok := m.Body.(bytesBody); ok && len(b) == 0 {
		mistakes = append(mistakes, errEmptyBody)
	}
	if o := m.MailOptions; o != nil {
		mistakes = append(mistakes, o.check()...)
	}
	var named map[string]bool
	if len(m.RcptOptions) > 0 {
		named = make(map[string]bool, len(m.To))
		for _, to := range m.To {
			named[to] = true
		}
	}
	for to, o := range m.RcptOptions {
		if !named[to] {
			mistake("RcptOptions for %s, who is not in To", quoted(to))
		}
		if o != nil {
			for _, err := range o.check() {
				mistake("RcptOptions of %s: %w", quoted(to), err)
			}
		}
	}
	return errors.Join(mistakes...)
}

// checkPath reports what is wrong with an address as a reverse-path or forward-path (RFC 5321, 4.1.2 and 4.5.3.1). It is
// strict about whatever a relay, of however simple a parser, could read as more than an address or as its end, and about
// what a reader would not see. It is lenient about what relays exist for: dots in odd places.
func checkPath(addr string) error {
	switch {
	case addr == "":
		return errors.New("the address is empty")
	case !utf8.ValidString(addr):
		return errors.New("not valid UTF-8")
	}
	if err := checkCharacters(addr); err != nil {
		return err
	}
	switch {
	case strings.ContainsAny(addr, "<>"): // within quotes too: not every relay knows of those
		return errors.New("want the address alone, without angle brackets or display name")
	case len(addr) > maxAddress:
		return fmt.Errorf("%d octets, more than %d", len(addr), maxAddress)
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
	} else if i := strings.IndexAny(local, "()[]:;@\\,\" "); i >= 0 {
		return fmt.Errorf("character %q before @", local[i])
	}
	if strings.HasPrefix(domain, "[") {
		if !validLiteral(domain) {
			return fmt.Errorf("domain %s is not an address literal", quoted(domain))
		}
		return nil
	}
	if !validDomain(asciiDomain(domain)) {
		return fmt.Errorf("%s is not a domain name", quoted(domain))
	}
	return nil
}

// maxAddress is how many octets an address has at most: a path has two more, its angle brackets (RFC 5321, 4.5.3.1.3).
const maxAddress = 254

// checkCharacters reports characters that stand in no address: those that show nothing or change how their neighbours
// show, some of which end a line or a word in a relay, and those that are something else after normalisation.
func checkCharacters(s string) error {
	for _, r := range s {
		switch {
		case unicode.IsControl(r):
			return fmt.Errorf("control character %+q", r)
		case isInvisible(r):
			return fmt.Errorf("invisible character %+q", r)
		case isFormOfPunctuation(r):
			return fmt.Errorf("character %+q", r)
		}
	}
	return nil
}

// isInvisible reports whether r is a format character, such as those that set the direction or have no width, white space
// other than the space of ASCII, or nobody's character.
func isInvisible(r rune) bool {
	return !unicode.IsPrint(r) ||
		r > unicode.MaxLatin1 && unicode.In(r, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector)
}

// isFormOfPunctuation reports whether r is a small or full-width form of a character of ASCII that is neither letter nor
// digit: Unicode's normalisation (NFKC), which a relay may apply, turns it into that.
func isFormOfPunctuation(r rune) bool {
	return (0xfe50 <= r && r <= 0xfe6f || 0xff01 <= r && r <= 0xff5e) && !unicode.IsLetter(r) && !unicode.IsDigit(r)
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
