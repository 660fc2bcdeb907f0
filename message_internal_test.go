package smtprelay

import (
	"cmp"
	"fmt"
	"io"
	"log"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/emersion/go-smtp"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/netpipe"
	"github.com/smtprelay/smtprelay/internal/wire"
)

func TestAddressIsAcceptedOrRefusedWithAReason(t *testing.T) {
	for _, tt := range []struct {
		why, addr string
		says      string // in the error; "" means that the address is valid
	}{
		{"the usual", "ann@example.org", ""},
		{"upper case is kept", "Ann.Smith@Example.ORG", ""},
		{"all characters of an atom (RFC 5322, 3.2.3)", "a!#$%&'*+-/=?^_`{|}~z@example.org", ""},
		{"tags of plus", "ann+news@example.org", ""},
		{"dots in odd places, which some relays allow", ".a..b.@example.org", ""},
		{"a domain of one label", "ann@relay", ""},
		{"a domain of digits", "ann@123.example", ""},
		{"an underscore in a domain, invalid but in use", "ann@a_b.example", ""},
		{"an A-label", "ann@xn--bcher-kva.example", ""},
		{"a U-label (RFC 6531, 3.3)", "ann@bücher.example", ""},
		{"a local part beyond ASCII", "jürgen@example.org", ""},
		{"an IPv4 literal (RFC 5321, 4.1.3)", "ann@[192.0.2.1]", ""},
		{"an IPv6 literal", "ann@[IPv6:2001:db8::1]", ""},
		{"a quoted local part", `"ann smith"@example.org`, ""},
		{"a quoted at sign", `"a@b"@example.org`, ""},
		{"a quoted parameter, which no relay takes for one before the end of the path", `" SIZE=1 "@example.org`, ""},
		{"letters that read from right to left", "דוגמה@example.org", ""},
		{"letters with combining marks", "कि@example.org", ""},
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
		{"a parameter after the path", "ann@example.org> SIZE=1", "angle brackets"},
		{"the path's end and a parameter in quotes", `"boss@attacker.example> ORCPT="@relay.example`, "angle brackets"},
		{"the path's end after a backslash", `"boss@attacker.example\> ORCPT="@relay.example`, "angle brackets"},
		{"another path in quotes", `"<boss@attacker.example"@relay.example`, "angle brackets"},
		{"quoted brackets", `"<a>"@example.org`, "angle brackets"},
		{"a quoted CR", "\"a\\\rb\"@example.org", `'\r'`},
		{"a C1 line end", "a\u0085b@example.org", `'\u0085'`},
		{"the C1 string terminator, in quotes", "\"a\u009cb\"@example.org", `'\u009c'`},
		{"a line separator", "a\u2028b@example.org", `'\u2028'`},
		{"a paragraph separator", "ann@exa\u2029mple.org", `'\u2029'`},
		{"a no-break space, at which some parsers split words", "ann@example.org\u00a0SIZE=1", `'\u00a0'`},
		{"an ideographic space", "ann\u3000smith@example.org", `'\u3000'`},
		{"a direction override", "ann\u202egro.elpmaxe@example.org", `'\u202e'`},
		{"a direction isolate", "\"a\u2066b\"@example.org", `'\u2066'`},
		{"a direction mark", "ann\u061c@example.org", `'\u061c'`},
		{"a zero-width space", "ann\u200b@example.org", `'\u200b'`},
		{"a joiner in the domain", "ann@exam\u200dple.org", `'\u200d'`},
		{"a byte order mark", "\ufeffann@example.org", `'\ufeff'`},
		{"a soft hyphen", "ann@exam\u00adple.org", `'\u00ad'`},
		{"an invisible letter", "ann\u3164@example.org", `'\u3164'`},
		{"a variation selector", "ann\ufe0f@example.org", `'\ufe0f'`},
		{"a tag", "ann\U000e0041@example.org", `'\U000e0041'`},
		{"a private-use character", "ann\ue000@example.org", `'\ue000'`},
		{"a full-width bracket, which a relay may normalise", "ann@example.org＞@relay.example", `'\uff1e'`},
		{"a full-width at sign", "boss＠attacker.example@relay.example", `'\uff20'`},
		{"a small comma", "a﹐b@example.org", `'\ufe50'`},
		{"no at sign", "ann", "no @"},
		{"nothing before @", "@example.org", "0 octets"},
		{"65 octets before @", strings.Repeat("a", 65) + "@example.org", "65 octets"},
		{"255 octets in all", "a@" + strings.Repeat("x.", 126) + "x", "255 octets"},
		{"a space", "ann smith@example.org", "' '"},
		{"two at signs", "a@b@example.org", "'@'"},
		{"a comma, as in a list", "a@x.example,b@y.example", "'@'"},
		{"a comma before @", "a,b@example.org", "','"},
		{"a source route (RFC 5321, appendix C)", "@hop.example:ann@example.org", "'@'"},
		{"a backslash outside quotes", `a\b@example.org`, `'\\'`},
		{"a quote within the local part", `a"b"@example.org`, `'"'`},
		{"an unterminated quote", `"ann@example.org`, "quoted"},
		{"text after a quote", `"a"b@example.org`, "quoted"},
		{"a quote that ends twice", `"a"b"@example.org`, "quoted"},
		{"an escaped end of a quote", `"a\"@example.org`, "quoted"},
		{"an empty quote", `""@example.org`, "quoted"},
		{"a quote alone", `"@example.org`, "quoted"},
		{"nothing after @", "ann@", "domain"},
		{"a space in the domain", "ann@example org", "domain"},
		{"a bracket in the domain of a quoted local part", `"a"@example.org>`, "angle brackets"},
		{"an extra dot", "ann@example..org", "domain"},
		{"a dot at the end", "ann@example.org.", "domain"},
		{"a hyphen first in a label", "ann@-example.org", "domain"},
		{"a hyphen last in a label", "ann@example-.org", "domain"},
		{"an unterminated literal", "ann@[192.0.2.1", "literal"},
		{"a literal followed by text", "ann@[192.0.2.1]x", "literal"},
		{"a literal without an address", "ann@[example.org]", "literal"},
		{"an IPv6 address without its tag", "ann@[2001:db8::1]", "literal"},
		{"an IPv4 address with the tag", "ann@[IPv6:192.0.2.1]", "literal"},
		{"an IPv6 zone, which has no meaning elsewhere", "ann@[IPv6:fe80::1%eth0]", "literal"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			err := checkPath(tt.addr)
			switch {
			case tt.says == "" && err != nil:
				t.Errorf("%q: got %v, want it accepted", tt.addr, err)
			case tt.says != "" && (err == nil || !strings.Contains(err.Error(), tt.says)):
				t.Errorf("%q: got %v, want an error that contains %q", tt.addr, err, tt.says)
			}
		})
	}
}

func TestAllPartsOfAMessageAreChecked(t *testing.T) {
	text := func(s string) *string { return &s }
	number := func(n int) *int { return &n }
	mail := func(o MailOptions) func(*Message) { return func(m *Message) { m.MailOptions = &o } }
	rcpt := func(o RcptOptions) func(*Message) {
		return func(m *Message) {
			m.RcptOptions = map[string]*RcptOptions{"ann@example.org": &o, "bob@example.org": {}}
		}
	}
	for _, tt := range []struct {
		why  string
		edit func(*Message)
		says []string // in the error; none means that the message is valid
	}{
		{"only the required fields", func(m *Message) {}, nil},
		{"the null reverse-path (RFC 5321, 4.5.5)", func(m *Message) { m.From = NullSender }, nil},
		{"no reverse-path: the null one must be explicit", func(m *Message) { m.From = "" }, []string{"From is empty", "NullSender"}},
		{"postmaster needs no domain in RCPT (RFC 5321, 4.1.1.3)", func(m *Message) { m.To = []string{"Postmaster"} }, nil},
		{"postmaster needs a domain in a reverse-path (RFC 5321, 4.1.1.3)", func(m *Message) { m.From = "postmaster" }, []string{`From "postmaster"`, "no @"}},
		{"no recipients", func(m *Message) { m.To = nil }, []string{"no recipients"}},
		{"no body", func(m *Message) { m.Body = nil }, []string{"Body is nil"}},
		{"an empty body", func(m *Message) { m.Body = Bytes(nil) }, []string{"empty"}},
		{"all mistakes at once", func(m *Message) { *m = Message{From: "x", To: []string{"y", "a@example.org", "z"}} },
			[]string{`From "x"`, `To "y"`, `To "z"`, "Body is nil"}},

		{"every parameter of MAIL", mail(MailOptions{Body: Body8BitMIME, Size: 1, UTF8: true, RequireTLS: true,
			Return: DSNReturnFull, EnvelopeID: "id 1+2", Auth: text("ann@example.org"),
			DeliverBy: &DeliverBy{Time: time.Second, Mode: DeliverByReturn, Trace: true}, Priority: number(9)}), nil},
		{"other values of MAIL's parameters", mail(MailOptions{Body: Body7Bit, Return: DSNReturnHeaders, Auth: text(""),
			DeliverBy: &DeliverBy{Time: -time.Hour, Mode: DeliverByNotify}, Priority: number(-9)}), nil},
		{"BINARYMIME, which DATA cannot carry", mail(MailOptions{Body: BodyBinaryMIME}), []string{"MailOptions.Body BINARYMIME"}},
		{"an unknown BODY, which could be more than one parameter", mail(MailOptions{Body: "8BITMIME SIZE=1"}), []string{"MailOptions.Body"}},
		{"a negative size", mail(MailOptions{Size: -1}), []string{"MailOptions.Size"}},
		{"another RET", mail(MailOptions{Return: "FULL\r\nRSET"}), []string{"MailOptions.Return"}},
		{"ENVID with a line end", mail(MailOptions{EnvelopeID: "a\nb"}), []string{"MailOptions.EnvelopeID"}},
		{"ENVID beyond ASCII", mail(MailOptions{EnvelopeID: "é"}), []string{"MailOptions.EnvelopeID"}},
		{"the longest ENVID (RFC 3461, 4.4)", mail(MailOptions{EnvelopeID: strings.Repeat("x", 100)}), nil},
		{"a longer one", mail(MailOptions{EnvelopeID: strings.Repeat("x", 101)}), []string{"MailOptions.EnvelopeID"}},
		{"AUTH without an address", mail(MailOptions{Auth: text("ann\r\n")}), []string{`MailOptions.Auth "ann\r\n"`}},
		{"AUTH without a domain (RFC 4954, 5)", mail(MailOptions{Auth: text("postmaster")}), []string{"MailOptions.Auth", "no @"}},

		{"no options for a recipient", func(m *Message) { m.RcptOptions = map[string]*RcptOptions{"ann@example.org": nil} }, nil},
		{"every parameter of RCPT", rcpt(RcptOptions{Notify: []DSNNotify{DSNNotifySuccess, DSNNotifyDelayed, DSNNotifyFailure},
			OriginalRecipientType: DSNAddressTypeRFC822, OriginalRecipient: "ann@example.org", RequireRecipientValidSince: time.Unix(1, 0)}), nil},
		{"its other values", rcpt(RcptOptions{Notify: []DSNNotify{DSNNotifyNever},
			OriginalRecipientType: DSNAddressTypeUTF8, OriginalRecipient: "jürgen@example.org"}), nil},
		{"options for an address that is not a recipient, of any form", func(m *Message) { m.RcptOptions = map[string]*RcptOptions{"x\ny": {}} },
			[]string{"RcptOptions", `x\ny`, "not in To"}},
		{"NEVER with another condition (RFC 3461, 4.1)", rcpt(RcptOptions{Notify: []DSNNotify{DSNNotifyNever, DSNNotifyFailure}}), []string{"NEVER"}},
		{"a condition twice", rcpt(RcptOptions{Notify: []DSNNotify{DSNNotifyFailure, DSNNotifyFailure}}), []string{"FAILURE", "twice"}},
		{"another condition", rcpt(RcptOptions{Notify: []DSNNotify{"SUCCESS\r\n"}}), []string{"Notify"}},
		{"ORCPT beyond ASCII without the type", rcpt(RcptOptions{OriginalRecipient: "jürgen@example.org"}), []string{"OriginalRecipient", "UTF-8"}},
		{"ORCPT with a line end", rcpt(RcptOptions{OriginalRecipient: "a\nb"}), []string{"OriginalRecipient"}},
		{"ORCPT of UTF-8 with a line end, which RFC 6533, 3 cannot express",
			rcpt(RcptOptions{OriginalRecipientType: DSNAddressTypeUTF8, OriginalRecipient: "a\nb"}), []string{"OriginalRecipient", `'\n'`}},
		{"ORCPT of UTF-8 with a direction override",
			rcpt(RcptOptions{OriginalRecipientType: DSNAddressTypeUTF8, OriginalRecipient: "a\u202eb"}), []string{"OriginalRecipient", `'\u202e'`}},
		{"ORCPT of invalid UTF-8", rcpt(RcptOptions{OriginalRecipientType: DSNAddressTypeUTF8, OriginalRecipient: "\xff"}), []string{"UTF-8"}},
		{"an unknown type of address", rcpt(RcptOptions{OriginalRecipientType: "X400", OriginalRecipient: "x"}), []string{"OriginalRecipientType"}},
		{"the longest ORCPT (RFC 3461, 4.2)", rcpt(RcptOptions{OriginalRecipient: strings.Repeat("x", 500)}), nil},
		{"a longer one", rcpt(RcptOptions{OriginalRecipient: strings.Repeat("x", 501)}), []string{"500"}},
		{"RRVS of a year that RFC 3339 cannot express", rcpt(RcptOptions{RequireRecipientValidSince: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)}),
			[]string{"RequireRecipientValidSince", "year"}},
		{"RRVS that reaches that year in UTC", rcpt(RcptOptions{RequireRecipientValidSince: time.Date(9999, 12, 31, 23, 0, 0, 0, time.FixedZone("", -2*60*60))}),
			[]string{"RequireRecipientValidSince", "year"}},
		{"the longest BY (RFC 2852, 4)", mail(MailOptions{DeliverBy: &DeliverBy{Time: 999_999_999 * time.Second, Mode: DeliverByReturn}}), nil},
		{"a longer one", mail(MailOptions{DeliverBy: &DeliverBy{Time: 1_000_000_000 * time.Second, Mode: DeliverByReturn}}),
			[]string{"MailOptions.DeliverBy.Time is 1000000000 seconds", "nine digits"}},
		{"the same in the past", mail(MailOptions{DeliverBy: &DeliverBy{Time: -1_000_000_000 * time.Second, Mode: DeliverByNotify}}),
			[]string{"MailOptions.DeliverBy.Time is -1000000000 seconds", "nine digits"}},
		{"a long address is truncated in the error", func(m *Message) { m.From = strings.Repeat("é", 80) + "zzz" },
			[]string{"From \"" + strings.Repeat("é", 64) + "\"...: "}},
		{"a long domain is truncated in the error", func(m *Message) { m.From = "a@-" + strings.Repeat("x", 200) }, []string{"\"-" + strings.Repeat("x", 127) + "\"... is not a domain name"}},
		{"postmaster with another letter s", func(m *Message) { m.To = []string{"poſtmaster"} }, []string{"no @"}},
		{"an unknown mode of BY", mail(MailOptions{DeliverBy: &DeliverBy{Time: time.Minute, Mode: "X"}}), []string{"MailOptions.DeliverBy.Mode"}},
		{"BY, or return, in 0 seconds (RFC 2852, 4)", mail(MailOptions{DeliverBy: &DeliverBy{Mode: DeliverByReturn}}), []string{"MailOptions.DeliverBy.Time"}},
		{"BY, or return, in less than a second",
			mail(MailOptions{DeliverBy: &DeliverBy{Time: time.Second - 1, Mode: DeliverByReturn}}), []string{"MailOptions.DeliverBy.Time"}},
		{"a priority too high (RFC 6710, 3)", mail(MailOptions{Priority: number(10)}), []string{"Priority"}},
		{"a priority too low", mail(MailOptions{Priority: number(-10)}), []string{"Priority"}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			m := Message{From: "shop@example.com", To: []string{"bob@example.org", "ann@example.org"}, Body: Bytes([]byte("x"))}
			tt.edit(&m)
			err := m.check()
			if len(tt.says) == 0 {
				if err != nil {
					t.Errorf("got %v, want it accepted", err)
				}
				return
			}
			if err == nil {
				t.Fatalf("it was accepted, want an error that contains %q", tt.says)
			}
			for _, words := range tt.says {
				if !strings.Contains(err.Error(), words) {
					t.Errorf("got %q, which does not contain %q", err, words)
				}
			}
			for line := range strings.SplitSeq(err.Error(), "\n") { // from errors.Join
				if strings.ContainsFunc(line, unicode.IsControl) {
					t.Errorf("got %q, with a control character of the caller", line)
				}
			}
		})
	}
}

// parser is a go-smtp server in memory, used as a parser of envelopes: it records what it parsed.
type parser struct {
	conn    *netpipe.Conn
	replies *wire.ReplyReader

	// Set by the server before it replies.
	path string
	mail MailOptions
	rcpt RcptOptions
}

func newParser(tb testing.TB) *parser {
	p := &parser{}
	s := smtp.NewServer(smtp.BackendFunc(func(*smtp.Conn) (smtp.Session, error) { return p, nil }))
	s.EnableSMTPUTF8, s.EnableREQUIRETLS, s.EnableDSN, s.EnableRRVS = true, true, true, true
	s.MaxLineLength = 1 << 20
	s.ErrorLog = log.New(io.Discard, "", 0)
	l := netpipe.Listen(1 << 20)
	done := make(chan struct{})
	go func() { // ends when the listener is closed
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
		tb.Fatalf("%q got more than one reply", line)
	}
	return r
}

func (p *parser) must(tb testing.TB, line string) {
	tb.Helper()
	if r := p.say(tb, line); r.Class() != 2 {
		tb.Fatalf("go-smtp does not accept %q: %d %s", line, r.Code, r.Text)
	}
}

func (p *parser) Mail(from string, opts *smtp.MailOptions) error {
	p.path = from
	p.mail = MailOptions{Body: BodyType(opts.Body), Size: opts.Size, UTF8: opts.UTF8, RequireTLS: opts.RequireTLS,
		Return: DSNReturn(opts.Return), EnvelopeID: opts.EnvelopeID, Auth: opts.Auth}
	return nil
}

func (p *parser) Rcpt(to string, opts *smtp.RcptOptions) error {
	p.path = to
	p.rcpt = RcptOptions{OriginalRecipientType: DSNAddressType(opts.OriginalRecipientType), OriginalRecipient: opts.OriginalRecipient,
		RequireRecipientValidSince: opts.RequireRecipientValidSince}
	for _, n := range opts.Notify {
		p.rcpt.Notify = append(p.rcpt.Notify, DSNNotify(n))
	}
	return nil
}

func (p *parser) Data(io.Reader) error { return nil }
func (p *parser) Reset()               {}
func (p *parser) Logout() error        { return nil }

// unescaped returns the address without the quoting of its local part, like go-smtp.
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

// checkLine reports what is wrong with line as a single command.
func checkLine(line string) error {
	text, ended := strings.CutSuffix(line, "\r\n")
	if i := strings.IndexFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }); !ended || i >= 0 || !utf8.ValidString(text) {
		return fmt.Errorf("%q is not one line", line)
	}
	return nil
}

// FuzzCheckPath checks the purpose of the check: an address that passes is one path for a parser of the RFC's grammar, for
// go-smtp's, and for parsers that do not know quotes, and means the same there.
func FuzzCheckPath(f *testing.F) {
	for _, seed := range []string{
		"ann@example.org", "a+b=c@x.example", `"a b"@x.example`, `"<a>"@x.example`, `"a\"b\\"@x.example`, "jürgen@bücher.example", "ann@[192.0.2.1]",
		"ann@[IPv6:2001:db8::1]", "postmaster", ".a..b@x", "a@b> SIZE=1", "a@b\r\nRCPT TO:<c@d", "@a:b@c", `"a"@b>c`, `"@x`, `"\"@x`, "Ann <ann@example.org>", "",
		`"boss@attacker.example> ORCPT="@relay.example`, `" SIZE=1 "@x.example`, "a@x.example\u00a0SIZE=1", "\"a\\\u0085b\"@x.example", "a\u202eb@x.example", "a＞@x.example",
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
			case c < ' ' || c == 0x7f || c == '<' || c == '>':
				t.Fatalf("%q passes with %q", addr, c)
			case c == '\\' && quoted:
				i++
			case c == '"':
				quoted = !quoted
			case strings.IndexByte(`<> ,;()\`, c) >= 0 && !quoted:
				t.Fatalf("%q passes with %q outside quotes", addr, c)
			}
		}
		if quoted {
			t.Fatalf("%q passes with an unterminated quote", addr)
		}
		if strings.ContainsFunc(addr, func(r rune) bool {
			return unicode.In(r, unicode.C, unicode.Zl, unicode.Zp, unicode.Bidi_Control, unicode.Join_Control) || unicode.IsSpace(r) && r != ' '
		}) {
			t.Fatalf("%q passes with an invisible character", addr)
		}
		p.must(t, "RSET\r\n")
		for _, line := range []string{
			string(wire.AppendMail(nil, addr, &wire.MailParams{Body: "8BITMIME", Size: 7})),
			string(wire.AppendRcpt(nil, addr, &wire.RcptParams{}, false)),
		} {
			if err := checkLine(line); err != nil {
				t.Fatal(err)
			}
			_, arg, _ := strings.Cut(line, ":")
			if path, _, _ := strings.Cut(arg, ">"); path != "<"+addr {
				t.Errorf("a parser that cuts %q at the first bracket reads %q", line, path)
			}
			if word := strings.Fields(arg)[0]; strings.HasSuffix(word, ">") && word != "<"+addr+">" {
				t.Errorf("a parser that splits %q at white space reads %q", line, word)
			}
			p.must(t, line)
			if want := unescaped(addr); p.path != want {
				t.Errorf("go-smtp reads %q of %q, want %q", p.path, line, want)
			}
		}
		if want := (MailOptions{Body: Body8BitMIME, Size: 7}); p.mail != want {
			t.Errorf("go-smtp reads the parameters %+v after %q, want %+v", p.mail, addr, want)
		}
	})
}

// FuzzAppendCommands checks that parameters that pass Message.check are one line each, from which go-smtp's parser reads what was
// meant.
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
		mail := &MailOptions{Body: BodyType(body), Size: size, UTF8: utf8Mail, RequireTLS: requireTLS, Return: DSNReturn(ret), EnvelopeID: envID}
		if hasAuth {
			mail.Auth = &auth
		}
		rcpt := &RcptOptions{OriginalRecipient: orcpt}
		if orcpt != "" {
			rcpt.OriginalRecipientType = DSNAddressTypeRFC822
			if orcptUTF8 {
				rcpt.OriginalRecipientType = DSNAddressTypeUTF8
			}
		}
		if notify != "" {
			for n := range strings.SplitSeq(notify, ",") {
				rcpt.Notify = append(rcpt.Notify, DSNNotify(n))
			}
		}
		if since != 0 {
			rcpt.RequireRecipientValidSince = time.Unix(since, 0).UTC()
		}
		prio := int(priority)
		urgent := *mail
		urgent.Priority = &prio
		if byMode != "" {
			urgent.DeliverBy = &DeliverBy{Time: time.Duration(by), Mode: DeliverByMode(byMode), Trace: byTrace}
		}
		m := Message{From: addr, To: []string{addr}, Body: Bytes([]byte("x")), MailOptions: &urgent, RcptOptions: map[string]*RcptOptions{addr: rcpt}}
		if m.check() != nil {
			return
		}
		mailParams, rcptParams, urgentParams := mail.params(), rcpt.params(), urgent.params()
		mailLine := string(wire.AppendMail(nil, addr, &mailParams))
		rcptLine := string(wire.AppendRcpt(nil, addr, &rcptParams, utf8Mail))
		urgentLine := string(wire.AppendMail(nil, addr, &urgentParams))
		for _, line := range []string{mailLine, rcptLine, urgentLine} {
			if err := checkLine(line); err != nil {
				t.Fatal(err)
			}
		}

		// go-smtp before 0.26 parses BY and MT-PRIORITY after RCPT and not MAIL: it is not used here.
		params, ok := strings.CutPrefix(urgentLine, strings.TrimSuffix(mailLine, "\r\n"))
		if !ok || !urgency.MatchString(params) {
			t.Fatalf("%q does not continue %q with parameters as their RFCs require", urgentLine, mailLine)
		}

		// Omitted because go-smtp does not follow the RFCs: sizes of more than 32 bits, and octets beyond ASCII in xtext.
		if size > 1<<32-1 || hasAuth && !isASCII(auth) {
			return
		}
		p.must(t, "RSET\r\n")
		p.must(t, mailLine)
		want := *mail
		if hasAuth {
			plain := unescaped(auth)
			want.Auth = &plain
		}
		if got := p.mail; p.path != unescaped(addr) || !reflect.DeepEqual(got, want) {
			t.Errorf("go-smtp reads %q, %+v of %q, want %+v", p.path, got, mailLine, want)
		}
		p.must(t, rcptLine)
		got := p.rcpt
		if !got.RequireRecipientValidSince.Equal(rcpt.RequireRecipientValidSince) {
			t.Errorf("go-smtp reads %+v of %q, want %+v", got, rcptLine, *rcpt)
		}
		got.RequireRecipientValidSince = rcpt.RequireRecipientValidSince
		if p.path != unescaped(addr) || !reflect.DeepEqual(got, *rcpt) {
			t.Errorf("go-smtp reads %q, %+v of %q, want %+v", p.path, got, rcptLine, *rcpt)
		}
	})
}

// urgency matches what may follow the other parameters of MAIL (RFC 2852, 4; RFC 6710, 3).
var urgency = regexp.MustCompile(`^( BY=-?[0-9]{1,9};[NR]T?)? MT-PRIORITY=(0|-?[1-9])\r\n$`)

// Options of many recipients are examined once per message: the cost of a transaction does not grow with their number.
func TestOptionsOfManyRecipientsCostNothingPerTransaction(t *testing.T) {
	const recipients = 40_000
	cfg, err := Config{Addr: "127.0.0.1:25"}.check()
	if err != nil {
		t.Fatal(err)
	}
	m := Message{From: "a@x.example", Body: Bytes([]byte("Subject: many\r\n\r\n")), RcptOptions: map[string]*RcptOptions{}}
	for i := range recipients {
		to := fmt.Sprintf("r%d@y.example", i)
		m.To = append(m.To, to)
		m.RcptOptions[to] = &RcptOptions{Notify: []DSNNotify{DSNNotifyNever}}
	}
	d := delivery{c: &Client{cfg: cfg}, ctx: t.Context(), m: m}
	if err := d.begin(); err != nil {
		t.Fatal(err)
	}
	s := &session{Conn: new(conn.Conn)}
	*s.Extensions() = wire.Extensions{Keywords: []string{"DSN"}, Limits: wire.Limits{RcptMax: 1}}
	if n := testing.AllocsPerRun(1000, func() {
		if rcpts, err := d.fit(s); err != nil || len(rcpts) != 1 {
			t.Fatalf("%d recipients, %v", len(rcpts), err)
		}
	}); n > 4 {
		t.Errorf("%v allocations per transaction, want a few", n)
	}
	s.Extensions().Keywords = nil
	if _, err := d.fit(s); err == nil || !strings.Contains(err.Error(), "RcptOptions of <r0@y.example>: Notify") {
		t.Errorf("without DSN: %v, want the first recipient whose options need it", err)
	}
}

func TestOnlyRecipientsThatTheRelayCannotServeAreExcluded(t *testing.T) {
	since := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		why   string
		edit  func(*Message)
		offer []string
		left  string // the recipients of the transaction; "" means that the message fails as a whole
	}{
		{"all can be served", func(m *Message) { m.To = []string{"a@x", "b@x"} }, nil, "a@x b@x"},
		{"an address that is not ASCII", func(m *Message) {}, nil, "a@x b@x"},
		{"an address that is not ASCII, with SMTPUTF8", func(m *Message) {}, []string{"SMTPUTF8"}, "a@x ä@x b@x"},
		{"options that need DSN", func(m *Message) {
			m.RcptOptions = map[string]*RcptOptions{"a@x": {Notify: []DSNNotify{DSNNotifyNever}}}
		}, []string{"SMTPUTF8"}, "ä@x b@x"},
		{"options that need RRVS", func(m *Message) {
			m.RcptOptions = map[string]*RcptOptions{"b@x": {RequireRecipientValidSince: since}}
		}, nil, "a@x"},
		{"none can be served", func(m *Message) { m.To = []string{"ä@x", "ö@x"} }, nil, ""},
		{"a single one", func(m *Message) { m.To = []string{"ä@x"} }, nil, ""},
		{"all or nothing", func(m *Message) { m.AllOrNothing = true }, nil, ""},
		{"the sender needs it too", func(m *Message) { m.From = "ü@x" }, nil, ""},
		{"the message needs it too", func(m *Message) { m.MailOptions = &MailOptions{UTF8: true} }, nil, ""},
	} {
		m := Message{From: "f@x", To: []string{"a@x", "ä@x", "b@x"}, Body: Bytes([]byte("x"))}
		tt.edit(&m)
		d := &delivery{c: &Client{cfg: &settings{}}, ctx: t.Context(), m: m}
		if err := d.begin(); err != nil {
			t.Fatalf("%s: %v", tt.why, err)
		}
		ext := &wire.Extensions{Keywords: tt.offer}
		d.sift(ext)
		lacks := cmp.Or(d.lacks(ext), d.lacksForRcpts(ext))
		if (lacks != nil) != (tt.left == "") {
			t.Errorf("%s: got %v", tt.why, lacks)
		}
		if tt.left == "" {
			continue
		}
		var left []string
		for _, i := range d.todo {
			left = append(left, m.To[i])
		}
		if got := strings.Join(left, " "); got != tt.left {
			t.Errorf("%s: %q are served, want %q", tt.why, got, tt.left)
		}
		unfit := 0
		for _, r := range d.receipt.Recipients {
			if r.Err != nil {
				unfit++
			}
		}
		if unfit != len(m.To)-len(left) || (unfit > 0) != (d.refusal != nil) {
			t.Errorf("%s: %d are excluded, the refusal is %v", tt.why, unfit, d.refusal)
		}
		if got := d.params(ext).UTF8; got != strings.Contains(tt.left, "ä") {
			t.Errorf("%s: SMTPUTF8 %v", tt.why, got)
		}
	}
}
