package smtprelay

import (
	"fmt"
	"io"
	"log"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/emersion/go-smtp"

	"github.com/smtprelay/smtprelay/internal/netpipe"
	"github.com/smtprelay/smtprelay/internal/wire"
)

func TestPathIsTakenOrRefusedForAReason(t *testing.T) {
	for _, tt := range []struct {
		why, addr string
		says      string // in the error; "" means that the address is good
	}{
		{"the usual", "ann@example.org", ""},
		{"upper case is kept", "Ann.Smith@Example.ORG", ""},
		{"all that may stand in an atom (RFC 5322, 3.2.3)", "a!#$%&'*+-/=?^_`{|}~z@example.org", ""},
		{"tags of plus", "ann+news@example.org", ""},
		{"dots in odd places, as some relays have them", ".a..b.@example.org", ""},
		{"a domain of one label", "ann@relay", ""},
		{"a domain of digits", "ann@123.example", ""},
		{"an underscore in a domain, against the rule and in use", "ann@a_b.example", ""},
		{"an A-label", "ann@xn--bcher-kva.example", ""},
		{"a U-label (RFC 6531, 3.3)", "ann@bücher.example", ""},
		{"a local part beyond ASCII", "jürgen@example.org", ""},
		{"an IPv4 literal (RFC 5321, 4.1.3)", "ann@[192.0.2.1]", ""},
		{"an IPv6 literal", "ann@[IPv6:2001:db8::1]", ""},
		{"a quoted local part", `"ann smith"@example.org`, ""},
		{"a quoted at sign", `"a@b"@example.org`, ""},
		{"quoted brackets", `"<a>"@example.org`, ""},
		{"a quoted quote", `"a\"b"@example.org`, ""},
		{"a quoted backslash at the end", `"a\\"@example.org`, ""},
		{"64 octets before @", strings.Repeat("a", 64) + "@example.org", ""},
		{"254 octets in all", "a@" + strings.Repeat("x.", 125) + "xx", ""},

		{"nothing", "", "empty"},
		{"CR", "a\r@example.org", `'\r'`},
		{"LF", "a@example.org\n", `'\n'`},
		{"NUL", "a\x00@example.org", `'\x00'`},
		{"DEL", "a\x7f@example.org", `'\x7f'`},
		{"a tab within quotes too", "\"a\tb\"@example.org", `'\t'`},
		{"bytes that are not UTF-8", "a\xff@example.org", "UTF-8"},
		{"a display name", "Ann <ann@example.org>", "display name"},
		{"brackets", "<ann@example.org>", "angle brackets"},
		{"the null path, which From spells as the empty string", "<>", "angle brackets"},
		{"a parameter behind the path", "ann@example.org> SIZE=1", "angle brackets"},
		{"no at sign", "ann", "no @"},
		{"nothing before @", "@example.org", "0 octets"},
		{"65 octets before @", strings.Repeat("a", 65) + "@example.org", "65 octets"},
		{"255 octets in all", "a@" + strings.Repeat("x.", 126) + "x", "255 octets"},
		{"a space", "ann smith@example.org", "' '"},
		{"two at signs", "a@b@example.org", "'@'"},
		{"a comma, as of a list", "a@x.example,b@y.example", "'@'"},
		{"a comma before @", "a,b@example.org", "','"},
		{"a source route (RFC 5321, appendix C)", "@hop.example:ann@example.org", "'@'"},
		{"a backslash outside quotes", `a\b@example.org`, `'\\'`},
		{"a quote within the local part", `a"b"@example.org`, `'"'`},
		{"a quote that is not ended", `"ann@example.org`, "quoted"},
		{"a quote that ends early", `"a"b@example.org`, "quoted"},
		{"a quote that ends twice", `"a"b"@example.org`, "quoted"},
		{"a quote whose end is quoted", `"a\"@example.org`, "quoted"},
		{"an empty quote", `""@example.org`, "quoted"},
		{"a quote alone", `"@example.org`, "quoted"},
		{"nothing behind @", "ann@", "domain"},
		{"a space in the domain", "ann@example org", "domain"},
		{"a bracket in the domain of a quoted local part", `"a"@example.org>`, "domain"},
		{"a dot too many", "ann@example..org", "domain"},
		{"a dot at the end", "ann@example.org.", "domain"},
		{"a hyphen first in a label", "ann@-example.org", "domain"},
		{"a hyphen last in a label", "ann@example-.org", "domain"},
		{"a literal that is not ended", "ann@[192.0.2.1", "literal"},
		{"a literal with something behind it", "ann@[192.0.2.1]x", "literal"},
		{"a literal of no address", "ann@[example.org]", "literal"},
		{"an IPv6 address without its tag", "ann@[2001:db8::1]", "literal"},
		{"an IPv4 address with the tag", "ann@[IPv6:192.0.2.1]", "literal"},
		{"an IPv6 zone, which means nothing elsewhere", "ann@[IPv6:fe80::1%eth0]", "literal"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			err := checkPath(tt.addr)
			switch {
			case tt.says == "" && err != nil:
				t.Errorf("%q: got %v, want it taken", tt.addr, err)
			case tt.says != "" && (err == nil || !strings.Contains(err.Error(), tt.says)):
				t.Errorf("%q: got %v, want an error that says %q", tt.addr, err, tt.says)
			}
		})
	}
}

func TestMessageIsCheckedInAllItsParts(t *testing.T) {
	text := func(s string) *string { return &s }
	number := func(n int) *int { return &n }
	mail := func(o smtp.MailOptions) func(*Message) { return func(m *Message) { m.MailOptions = &o } }
	rcpt := func(o smtp.RcptOptions) func(*Message) {
		return func(m *Message) {
			bob := smtp.RcptOptions{DeliverBy: o.DeliverBy, MTPriority: o.MTPriority} // which are for all
			m.RcptOptions = map[string]*smtp.RcptOptions{"ann@example.org": &o, "bob@example.org": &bob}
		}
	}
	for _, tt := range []struct {
		why  string
		edit func(*Message)
		says []string // in the error; none means that the message is good
	}{
		{"nothing set that need not be", func(m *Message) {}, nil},
		{"the null reverse-path (RFC 5321, 4.5.5)", func(m *Message) { m.From = "" }, nil},
		{"postmaster needs no domain in RCPT (RFC 5321, 4.1.1.3)", func(m *Message) { m.To = []string{"Postmaster"} }, nil},
		{"it has a domain in a reverse-path (RFC 5321, 4.1.1.3)", func(m *Message) { m.From = "postmaster" }, []string{`From "postmaster"`, "no @"}},
		{"no recipients", func(m *Message) { m.To = nil }, []string{"no recipients"}},
		{"no body", func(m *Message) { m.Body = nil }, []string{"Body is nil"}},
		{"a body of nothing", func(m *Message) { m.Body = Bytes(nil) }, []string{"empty"}},
		{"all mistakes at once", func(m *Message) { *m = Message{From: "x", To: []string{"y", "a@example.org", "z"}} },
			[]string{`From "x"`, `To "y"`, `To "z"`, "Body is nil"}},

		{"every parameter of MAIL", mail(smtp.MailOptions{Body: smtp.Body8BitMIME, Size: 1, UTF8: true, RequireTLS: true,
			Return: smtp.DSNReturnFull, EnvelopeID: "id 1+2", Auth: text("ann@example.org")}), nil},
		{"its other values", mail(smtp.MailOptions{Body: smtp.Body7Bit, Return: smtp.DSNReturnHeaders, Auth: text("")}), nil},
		{"BINARYMIME, which DATA cannot carry", mail(smtp.MailOptions{Body: smtp.BodyBinaryMIME}), []string{"MailOptions.Body BINARYMIME"}},
		{"another BODY, which could be more than one word", mail(smtp.MailOptions{Body: "8BITMIME SIZE=1"}), []string{"MailOptions.Body"}},
		{"a negative size", mail(smtp.MailOptions{Size: -1}), []string{"MailOptions.Size"}},
		{"another RET", mail(smtp.MailOptions{Return: "FULL\r\nRSET"}), []string{"MailOptions.Return"}},
		{"ENVID with a line end", mail(smtp.MailOptions{EnvelopeID: "a\nb"}), []string{"MailOptions.EnvelopeID"}},
		{"ENVID beyond ASCII", mail(smtp.MailOptions{EnvelopeID: "é"}), []string{"MailOptions.EnvelopeID"}},
		{"the longest ENVID (RFC 3461, 4.4)", mail(smtp.MailOptions{EnvelopeID: strings.Repeat("x", 100)}), nil},
		{"a longer one", mail(smtp.MailOptions{EnvelopeID: strings.Repeat("x", 101)}), []string{"MailOptions.EnvelopeID"}},
		{"AUTH of no address", mail(smtp.MailOptions{Auth: text("ann\r\n")}), []string{`MailOptions.Auth "ann\r\n"`}},
		{"AUTH without a domain (RFC 4954, 5)", mail(smtp.MailOptions{Auth: text("postmaster")}), []string{"MailOptions.Auth", "no @"}},

		{"no options for a recipient", func(m *Message) { m.RcptOptions = map[string]*smtp.RcptOptions{"ann@example.org": nil} }, nil},
		{"every parameter of RCPT", rcpt(smtp.RcptOptions{Notify: []smtp.DSNNotify{smtp.DSNNotifySuccess, smtp.DSNNotifyDelayed, smtp.DSNNotifyFailure},
			OriginalRecipientType: smtp.DSNAddressTypeRFC822, OriginalRecipient: "ann@example.org", RequireRecipientValidSince: time.Unix(1, 0),
			DeliverBy: &smtp.DeliverByOptions{Time: time.Second, Mode: smtp.DeliverByReturn, Trace: true}, MTPriority: number(9)}), nil},
		{"its other values", rcpt(smtp.RcptOptions{Notify: []smtp.DSNNotify{smtp.DSNNotifyNever},
			OriginalRecipientType: smtp.DSNAddressTypeUTF8, OriginalRecipient: "jürgen@example.org",
			DeliverBy: &smtp.DeliverByOptions{Time: -time.Hour, Mode: smtp.DeliverByNotify}, MTPriority: number(-9)}), nil},
		{"options for somebody else, whose name may be anything", func(m *Message) { m.RcptOptions = map[string]*smtp.RcptOptions{"x\ny": {}} },
			[]string{"RcptOptions", `x\ny`, "not in To"}},
		{"NEVER with another (RFC 3461, 4.1)", rcpt(smtp.RcptOptions{Notify: []smtp.DSNNotify{smtp.DSNNotifyNever, smtp.DSNNotifyFailure}}), []string{"NEVER"}},
		{"a condition twice", rcpt(smtp.RcptOptions{Notify: []smtp.DSNNotify{smtp.DSNNotifyFailure, smtp.DSNNotifyFailure}}), []string{"FAILURE", "twice"}},
		{"another condition", rcpt(smtp.RcptOptions{Notify: []smtp.DSNNotify{"SUCCESS\r\n"}}), []string{"Notify"}},
		{"ORCPT beyond ASCII without saying so", rcpt(smtp.RcptOptions{OriginalRecipient: "jürgen@example.org"}), []string{"OriginalRecipient", "UTF-8"}},
		{"ORCPT with a line end", rcpt(smtp.RcptOptions{OriginalRecipient: "a\nb"}), []string{"OriginalRecipient"}},
		{"ORCPT of UTF-8 with a line end, which has no form in RFC 6533, 3",
			rcpt(smtp.RcptOptions{OriginalRecipientType: smtp.DSNAddressTypeUTF8, OriginalRecipient: "a\nb"}), []string{"OriginalRecipient", "control"}},
		{"ORCPT of UTF-8 that is not", rcpt(smtp.RcptOptions{OriginalRecipientType: smtp.DSNAddressTypeUTF8, OriginalRecipient: "\xff"}), []string{"UTF-8"}},
		{"another type of address", rcpt(smtp.RcptOptions{OriginalRecipientType: "X400", OriginalRecipient: "x"}), []string{"OriginalRecipientType"}},
		{"the longest ORCPT (RFC 3461, 4.2)", rcpt(smtp.RcptOptions{OriginalRecipient: strings.Repeat("x", 500)}), nil},
		{"a longer one", rcpt(smtp.RcptOptions{OriginalRecipient: strings.Repeat("x", 501)}), []string{"500"}},
		{"a priority for one of two, which MAIL cannot say", func(m *Message) {
			m.RcptOptions = map[string]*smtp.RcptOptions{"ann@example.org": {MTPriority: number(1)}, "bob@example.org": {MTPriority: number(1)}}
			m.To = append(m.To, "eve@example.org")
		}, []string{"MTPriority", "eve@example.org", "differ"}},
		{"another time to deliver by", func(m *Message) {
			m.RcptOptions = map[string]*smtp.RcptOptions{}
			for i, to := range m.To {
				m.RcptOptions[to] = &smtp.RcptOptions{DeliverBy: &smtp.DeliverByOptions{Time: time.Duration(i+1) * time.Hour, Mode: smtp.DeliverByNotify}}
			}
		}, []string{"DeliverBy", "differ"}},
		{"another mode of BY", rcpt(smtp.RcptOptions{DeliverBy: &smtp.DeliverByOptions{Time: time.Minute, Mode: "X"}}), []string{"DeliverBy.Mode"}},
		{"BY, or return, in no time (RFC 2852, 4)", rcpt(smtp.RcptOptions{DeliverBy: &smtp.DeliverByOptions{Mode: smtp.DeliverByReturn}}), []string{"DeliverBy.Time"}},
		{"BY, or return, in what becomes 0 seconds",
			rcpt(smtp.RcptOptions{DeliverBy: &smtp.DeliverByOptions{Time: time.Second - 1, Mode: smtp.DeliverByReturn}}), []string{"DeliverBy.Time"}},
		{"a priority too high (RFC 6710, 3)", rcpt(smtp.RcptOptions{MTPriority: number(10)}), []string{"MTPriority"}},
		{"a priority too low", rcpt(smtp.RcptOptions{MTPriority: number(-10)}), []string{"MTPriority"}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			m := Message{From: "shop@example.com", To: []string{"bob@example.org", "ann@example.org"}, Body: Bytes([]byte("x"))}
			tt.edit(&m)
			err := m.check()
			if len(tt.says) == 0 {
				if err != nil {
					t.Errorf("got %v, want it taken", err)
				}
				return
			}
			if err == nil {
				t.Fatalf("it was taken, want an error that says %q", tt.says)
			}
			for _, words := range tt.says {
				if !strings.Contains(err.Error(), words) {
					t.Errorf("got %q, which does not say %q", err, words)
				}
			}
			for line := range strings.SplitSeq(err.Error(), "\n") { // of errors.Join
				if strings.ContainsFunc(line, unicode.IsControl) {
					t.Errorf("got %q, with a control character of the caller's", line)
				}
			}
		})
	}
}

func TestSizeIsKnownOfBytesOnly(t *testing.T) {
	for _, tt := range []struct {
		why  string
		body io.WriterTo
		want int64
	}{
		{"bytes count as they will be sent", Bytes([]byte("a\nb")), 6},
		{"a reader must be read to know", Reader(strings.NewReader("a\nb")), 0},
		{"so must another's body", strings.NewReader("a\nb"), 0},
	} {
		if got := canonicalSize(&Message{Body: tt.body}); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.why, got, tt.want)
		}
	}
}

func TestQueueIDIsFound(t *testing.T) {
	for _, tt := range []struct{ relay, text, want string }{
		{"SendGrid", "Ok: queued as _bXzmsKbSfuMyZzZmB0wLg", "_bXzmsKbSfuMyZzZmB0wLg"},
		{"Postfix", "Ok: queued as 4Xyz1b2C3dz4fRt", "4Xyz1b2C3dz4fRt"},
		{"Postfix's short form", "Ok: queued as 9C0A31F", "9C0A31F"},
		{"Exim", "OK id=1tDabc-00000001Xyz-2pQr", "1tDabc-00000001Xyz-2pQr"},
		{"Amazon SES", "Ok 010001897a5b6c7d-0e1f2a3b-4c5d-6e7f-8a9b-0c1d2e3f4a5b-000000", "010001897a5b6c7d-0e1f2a3b-4c5d-6e7f-8a9b-0c1d2e3f4a5b-000000"},
		{"OpenSMTPD", "7f3a1b2c Message accepted for delivery", "7f3a1b2c"},
		{"Sendmail", "4AOEJ1x2012345 Message accepted for delivery", "4AOEJ1x2012345"},
		{"an identifier in brackets", "Message queued as <a.1@relay.example>", "a.1@relay.example"},
		{"a sentence's dot is not the identifier's", "Queued as abc123.", "abc123"},
		{"the words in any case", "OK ID=x1", "x1"},
		{"go-smtp says no identifier", "OK: queued", ""},
		{"aiosmtpd", "OK", ""},
		{"smtp-server", "OK: message queued", ""},
		{"Gmail says a time and more", "OK  1700000000 d2e1a72fcca58-12345.67 - gsmtp", ""},
		{"Mailgun's words", "Great success", ""},
		{"id within a word", "sender identified, will be idle", ""},
		{"an identifier that is none", "queued as ???", ""},
		{"nothing", "", ""},
	} {
		t.Run(tt.relay, func(t *testing.T) {
			if got := findQueueID(tt.text); got != tt.want {
				t.Errorf("%q: got %q, want %q", tt.text, got, tt.want)
			}
		})
	}
}

func FuzzQueueID(f *testing.F) {
	for _, seed := range []string{
		"Ok: queued as _bXzmsKbSfuMyZzZmB0wLg", "OK id=1tDabc-00000001Xyz-2pQr", "Ok 010001897a5b6c7d-0e1f2a3b", "7f3a1b2c Message accepted for delivery",
		"OK: queued", "OK  1700000000 d2e1a72fcca58-12345.67 - gsmtp", "Message accepted for delivery = <x@y>.", "queued with id <...", "id id = = a.",
		"first line\nOk: queued as 1",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		id := findQueueID(text)
		if id == "" {
			return
		}
		if !strings.Contains(text, id) {
			t.Errorf("%q is not in %q", id, text)
		}
		if strings.ContainsFunc(id, func(r rune) bool {
			return unicode.IsSpace(r) || unicode.IsControl(r) || strings.ContainsRune(`<>"'()[]`, r)
		}) {
			t.Errorf("%q of %q is more than a word", id, text)
		}
		if strings.HasSuffix(id, ".") {
			t.Errorf("%q of %q ends in a dot", id, text)
		}
	})
}

// parser is a go-smtp server, in memory, of which only the envelope's syntax matters: it tells what it has read.
type parser struct {
	conn    *netpipe.Conn
	replies *wire.ReplyReader

	// Set by the server before it answers.
	path string
	mail *smtp.MailOptions
	rcpt *smtp.RcptOptions
}

func newParser(tb testing.TB) *parser {
	p := &parser{}
	s := smtp.NewServer(smtp.BackendFunc(func(*smtp.Conn) (smtp.Session, error) { return p, nil }))
	s.EnableSMTPUTF8, s.EnableREQUIRETLS, s.EnableDSN, s.EnableRRVS, s.EnableDELIVERBY, s.EnableMTPRIORITY = true, true, true, true, true, true
	s.MaxLineLength = 1 << 20
	s.ErrorLog = log.New(io.Discard, "", 0)
	l := netpipe.Listen(1 << 20)
	done := make(chan struct{})
	go func() { // until the listener is closed
		defer close(done)
		s.Serve(l)
	}()
	var err error
	if p.conn, err = l.Dial(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		p.conn.Close()
		s.Close()
		<-done
	})
	p.replies = wire.NewReplyReader(p.conn)
	if _, err := p.replies.ReadReply(); err != nil {
		tb.Fatal(err)
	}
	p.must(tb, "EHLO client.example\r\n")
	return p
}

func (p *parser) say(tb testing.TB, line string) wire.Reply {
	tb.Helper()
	if _, err := io.WriteString(p.conn, line); err != nil {
		tb.Fatal(err)
	}
	r, err := p.replies.ReadReply()
	if err != nil {
		tb.Fatalf("%q: %v", line, err)
	}
	if p.replies.Buffered() > 0 || p.conn.Unread() > 0 {
		tb.Fatalf("%q was answered more than once", line)
	}
	return r
}

func (p *parser) must(tb testing.TB, line string) {
	tb.Helper()
	if r := p.say(tb, line); r.Class() != 2 {
		tb.Fatalf("go-smtp reads %q otherwise: %d %s", line, r.Code, r.Text)
	}
}

func (p *parser) Mail(from string, opts *smtp.MailOptions) error {
	p.path, p.mail = from, opts
	return nil
}

func (p *parser) Rcpt(to string, opts *smtp.RcptOptions) error {
	p.path, p.rcpt = to, opts
	return nil
}

func (p *parser) Data(io.Reader) error { return nil }
func (p *parser) Reset()               {}
func (p *parser) Logout() error        { return nil }

// unescaped is the address without the quoting of its local part, as go-smtp tells it.
func unescaped(addr string) string {
	quoted, ok := strings.CutPrefix(addr, `"`)
	if !ok {
		return addr
	}
	at := strings.LastIndexByte(quoted, '@')
	var b strings.Builder
	for i := 0; i < at-1; i++ { // the octet before @ is the closing quote
		if quoted[i] == '\\' {
			i++
		}
		b.WriteByte(quoted[i])
	}
	return b.String() + quoted[at:]
}

// checkLine reports what is wrong with line as one command.
func checkLine(line string) error {
	text, ended := strings.CutSuffix(line, "\r\n")
	if i := strings.IndexFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }); !ended || i >= 0 || !utf8.ValidString(text) {
		return fmt.Errorf("%q is not one line", line)
	}
	return nil
}

// FuzzCheckPath holds the check to what it is for: an address that passes is one path, for a reader of the RFC's grammar
// and for go-smtp's parser, and says there what it says here.
func FuzzCheckPath(f *testing.F) {
	for _, seed := range []string{
		"ann@example.org", "a+b=c@x.example", `"a b"@x.example`, `"<a>"@x.example`, `"a\"b\\"@x.example`, "jürgen@bücher.example", "ann@[192.0.2.1]",
		"ann@[IPv6:2001:db8::1]", "postmaster", ".a..b@x", "a@b> SIZE=1", "a@b\r\nRCPT TO:<c@d", "@a:b@c", `"a"@b>c`, `"@x`, `"\"@x`, "Ann <ann@example.org>", "",
	} {
		f.Add(seed)
	}
	p := newParser(f)
	f.Fuzz(func(t *testing.T, addr string) {
		if checkPath(addr) != nil {
			return
		}
		quoted := false
		for i := 0; i < len(addr); i++ {
			switch c := addr[i]; {
			case c < ' ' || c == 0x7f:
				t.Fatalf("%q passes with a control character", addr)
			case c == '\\' && quoted:
				i++
			case c == '"':
				quoted = !quoted
			case strings.IndexByte(`<> ,;()\`, c) >= 0 && !quoted:
				t.Fatalf("%q passes with %q outside quotes", addr, c)
			}
		}
		if quoted {
			t.Fatalf("%q passes with a quote that is not ended", addr)
		}
		p.must(t, "RSET\r\n")
		for _, line := range []string{
			string(wire.AppendMail(nil, addr, &smtp.MailOptions{Body: smtp.Body8BitMIME, Size: 7}, nil)),
			string(wire.AppendRcpt(nil, addr, nil, false)),
		} {
			if err := checkLine(line); err != nil {
				t.Fatal(err)
			}
			p.must(t, line)
			if want := unescaped(addr); p.path != want {
				t.Errorf("go-smtp reads %q of %q, want %q", p.path, line, want)
			}
		}
		if want := (smtp.MailOptions{Body: smtp.Body8BitMIME, Size: 7}); *p.mail != want {
			t.Errorf("go-smtp reads the parameters %+v behind %q, want %+v", p.mail, addr, want)
		}
	})
}

// FuzzAppendCommands holds the parameters that pass Message.check to one line each, of which go-smtp's parser reads what
// was meant.
func FuzzAppendCommands(f *testing.F) {
	f.Add("ann@example.org", "id 1+2=3", "e=mc2@example.com", true, "bob+x@example.org", false, "8BITMIME", "HDRS", int64(500000), true, true,
		"SUCCESS,FAILURE", int64(1396566060), int64(time.Hour), "R", true, int8(4))
	f.Add(`"a b"@x.example`, "", "", true, "jürgen = 漢😀\\@bücher.example", true, "7BIT", "FULL", int64(0), false, false,
		"NEVER", int64(0), int64(-time.Minute), "N", false, int8(-9))
	f.Add("a@x.example", "a\r\nRSET", "x\n", false, "a\r\nDATA\x00", true, "7BIT\r\n", "HDRS RET", int64(-1), false, false,
		"SUCCESS\r\nDATA", int64(-1), int64(1), "R\r\n", false, int8(10))
	p := newParser(f)
	f.Fuzz(func(t *testing.T, addr, envID, auth string, hasAuth bool, orcpt string, orcptUTF8 bool, body, ret string, size int64, utf8Mail, requireTLS bool,
		notify string, since, by int64, byMode string, byTrace bool, priority int8) {
		mail := &smtp.MailOptions{Body: smtp.BodyType(body), Size: size, UTF8: utf8Mail, RequireTLS: requireTLS, Return: smtp.DSNReturn(ret), EnvelopeID: envID}
		if hasAuth {
			mail.Auth = &auth
		}
		prio := int(priority)
		rcpt := &smtp.RcptOptions{OriginalRecipient: orcpt, MTPriority: &prio}
		if orcpt != "" {
			rcpt.OriginalRecipientType = smtp.DSNAddressTypeRFC822
			if orcptUTF8 {
				rcpt.OriginalRecipientType = smtp.DSNAddressTypeUTF8
			}
		}
		if notify != "" {
			for n := range strings.SplitSeq(notify, ",") {
				rcpt.Notify = append(rcpt.Notify, smtp.DSNNotify(n))
			}
		}
		if since != 0 {
			rcpt.RequireRecipientValidSince = time.Unix(since, 0).UTC()
		}
		if byMode != "" {
			rcpt.DeliverBy = &smtp.DeliverByOptions{Time: time.Duration(by), Mode: smtp.DeliverByMode(byMode), Trace: byTrace}
		}
		m := Message{From: addr, To: []string{addr}, Body: Bytes([]byte("x")), MailOptions: mail, RcptOptions: map[string]*smtp.RcptOptions{addr: rcpt}}
		if m.check() != nil {
			return
		}
		mailLine := string(wire.AppendMail(nil, addr, mail, nil))
		rcptLine := string(wire.AppendRcpt(nil, addr, rcpt, utf8Mail))
		urgent := string(wire.AppendMail(nil, addr, mail, rcpt))
		for _, line := range []string{mailLine, rcptLine, urgent} {
			if err := checkLine(line); err != nil {
				t.Fatal(err)
			}
		}

		// go-smtp reads BY and MT-PRIORITY behind RCPT.
		params, ok := strings.CutPrefix(urgent, strings.TrimSuffix(mailLine, "\r\n"))
		if !ok {
			t.Fatalf("%q does not go on as %q", urgent, mailLine)
		}
		rcptLine = strings.TrimSuffix(rcptLine, "\r\n") + params

		// What go-smtp does not read as the RFCs have it is left out: sizes of more than 32 bits, octets beyond ASCII in
		// xtext, white space beyond ASCII in ORCPT; and the years that RFC 3339 has no form for.
		year := rcpt.RequireRecipientValidSince.Year()
		if size > 1<<32-1 || hasAuth && !isASCII(auth) || strings.ContainsFunc(orcpt, func(r rune) bool { return r > 0x7f && unicode.IsSpace(r) }) ||
			since != 0 && (year < 1 || year > 9999) {
			return
		}
		p.must(t, "RSET\r\n")
		p.must(t, mailLine)
		want := *mail
		if hasAuth {
			plain := unescaped(auth)
			want.Auth = &plain
		}
		if got := p.mail; p.path != unescaped(addr) || !reflect.DeepEqual(*got, want) {
			t.Errorf("go-smtp reads %q, %+v of %q, want %+v", p.path, *got, mailLine, want)
		}
		p.must(t, rcptLine)
		wantRcpt := *rcpt
		if b := rcpt.DeliverBy; b != nil {
			whole := *b
			whole.Time = b.Time.Truncate(time.Second)
			wantRcpt.DeliverBy = &whole
		}
		got := *p.rcpt
		if !got.RequireRecipientValidSince.Equal(wantRcpt.RequireRecipientValidSince) || !slices.Equal(got.Notify, wantRcpt.Notify) {
			t.Errorf("go-smtp reads %+v of %q, want %+v", got, rcptLine, wantRcpt)
		}
		got.RequireRecipientValidSince, got.Notify = wantRcpt.RequireRecipientValidSince, wantRcpt.Notify
		if p.path != unescaped(addr) || !reflect.DeepEqual(got, wantRcpt) {
			t.Errorf("go-smtp reads %q, %+v of %q, want %+v", p.path, got, rcptLine, wantRcpt)
		}
	})
}
