package wire

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/textproto"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"unicode/utf8"
)

func TestReplyIsTakenApart(t *testing.T) {
	for _, tt := range []struct {
		why   string
		input string
		want  Reply
	}{
		{"one line", "250 ok\r\n", Reply{Code: 250, Text: "ok"}},
		{"the code alone is a whole reply (RFC 5321, 4.2)", "250\r\n", Reply{Code: 250}},
		{"code and space, as an empty challenge has it", "334 \r\n", Reply{Code: 334}},
		{"the lines of a multiline reply are joined", "220-relay.example\r\n220-no spam\r\n220 ready\r\n",
			Reply{Code: 220, Text: "relay.example\nno spam\nready"}},
		{"the last line of a multiline reply may be the code alone", "250-a\r\n250\r\n", Reply{Code: 250, Text: "a\n"}},
		{"a line of a multiline reply may be empty", "250-\r\n250-\r\n250 c\r\n", Reply{Code: 250, Text: "\n\nc"}},
		{"bare LF ends a line of old relays", "250-a\n250 b\n", Reply{Code: 250, Text: "a\nb"}},
		{"only the CR of the line end is cut off", "250 a\r\r\n", Reply{Code: 250, Text: "a\r"}},
		{"a dash in the text is text", "250 - a-b\r\n", Reply{Code: 250, Text: "- a-b"}},
		{"further spaces belong to the text", "250  two\r\n", Reply{Code: 250, Text: " two"}},

		{"the enhanced code is cut off", "550 5.1.1 no such user\r\n", Reply{550, [3]int{5, 1, 1}, "no such user"}},
		{"and off every line", "550-5.7.1 first\r\n550 5.7.1 second\r\n", Reply{550, [3]int{5, 7, 1}, "first\nsecond"}},
		{"the first line's counts where they differ", "550-5.7.1 a\r\n550 5.1.1 b\r\n", Reply{550, [3]int{5, 7, 1}, "a\nb"}},
		{"it may stand on the last line alone", "550-a\r\n550 5.1.1 b\r\n", Reply{550, [3]int{5, 1, 1}, "a\nb"}},
		{"it may be all there is", "250 2.1.5\r\n", Reply{250, [3]int{2, 1, 5}, ""}},
		{"its parts have up to three digits", "451 4.7.650 slow down\r\n", Reply{451, [3]int{4, 7, 650}, "slow down"}},
		{"of which four are too many", "451 4.7.6500 slow\r\n", Reply{Code: 451, Text: "4.7.6500 slow"}},
		{"only the first is cut off", "250 2.0.0 2.0.0 ok\r\n", Reply{250, [3]int{2, 0, 0}, "2.0.0 ok"}},
		{"its class must be the reply's (RFC 2034, 4)", "250 5.1.1 odd\r\n", Reply{Code: 250, Text: "5.1.1 odd"}},
		{"there is none in 3xx", "354 3.0.0 go\r\n", Reply{Code: 354, Text: "3.0.0 go"}},
		{"a version number is none", "220 2.0.x ready\r\n", Reply{Code: 220, Text: "2.0.x ready"}},
		{"nor is an address", "250 2.0.0.1 ok\r\n", Reply{Code: 250, Text: "2.0.0.1 ok"}},
		{"nor an unfinished one", "250 2.10..\r\n", Reply{Code: 250, Text: "2.10.."}},
		{"nor one cut short", "250 2.1000\r\n", Reply{Code: 250, Text: "2.1000"}},
		{"nor one of two parts", "250 2.100\r\n", Reply{Code: 250, Text: "2.100"}},
		{"nor one with something after it", "250 2.1.0-b\r\n", Reply{Code: 250, Text: "2.1.0-b"}},

		{"bytes that are not UTF-8 are replaced, for they end in logs", "250 caf\xe9\r\n", Reply{Code: 250, Text: "caf\uFFFD"}},
		{"UTF-8 is kept", "250 café\r\n", Reply{Code: 250, Text: "café"}},
		{"a line without a code within a reply is a line of its text", "250-first line\r\n  second, without a code\r\n250 last\r\n",
			Reply{Code: 250, Text: "first line\n  second, without a code\nlast"}},
		{"so is an empty one", "250-a\r\n\r\n250 b\r\n", Reply{Code: 250, Text: "a\n\nb"}},
		{"so is one that is nearly of a code", "250-a\r\n250b\r\n2500 c\r\n999 d\r\n250 e\r\n", Reply{Code: 250, Text: "a\n250b\n2500 c\n999 d\ne"}},
		{"an enhanced code stands after a code", "250-a\r\n2.1.5 b\r\n250 c\r\n", Reply{Code: 250, Text: "a\n2.1.5 b\nc"}},
		{"empty lines before a reply are no reply", "\r\n\n \t\r\n\r\r\n250 ok\r\n", Reply{Code: 250, Text: "ok"}},
		{"of lines whose codes differ the last one's counts", "220-mx.example\r\n521 5.7.1 blocked\r\n", Reply{521, [3]int{5, 7, 1}, "mx.example\nblocked"}},
		{"whichever way they differ", "550-a\r\n250 b\r\n", Reply{Code: 250, Text: "a\nb"}},
		{"or within one class", "250-a\r\n251 b\r\n", Reply{Code: 251, Text: "a\nb"}},
		{"of their enhanced codes the first of its class counts", "250-2.1.0 a\r\n550-5.7.1 b\r\n550 5.1.1 c\r\n", Reply{550, [3]int{5, 7, 1}, "a\nb\nc"}},
		{"and none of another class", "550-5.7.1 a\r\n250 b\r\n", Reply{Code: 250, Text: "a\nb"}},
		{"the least code", "200 a\r\n", Reply{Code: 200, Text: "a"}},
		{"the greatest code", "599 a\r\n", Reply{Code: 599, Text: "a"}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			// Byte by byte, since TCP may split anything.
			for _, r := range []io.Reader{strings.NewReader(tt.input), iotest.OneByteReader(strings.NewReader(tt.input))} {
				replies := NewReplyReader(r)
				got, err := replies.ReadReply()
				if err != nil {
					t.Fatalf("%q: %v", tt.input, err)
				}
				if got != tt.want {
					t.Errorf("%q: got %+v, want %+v", tt.input, got, tt.want)
				}
				if got.Class() != tt.want.Code/100 {
					t.Errorf("%q: got class %d, want %d", tt.input, got.Class(), tt.want.Code/100)
				}
				if _, err := replies.ReadReply(); err != io.EOF {
					t.Errorf("after %q: got %v, want io.EOF", tt.input, err)
				}
			}
		})
	}
}

func TestWhatIsNoReplyIsMalformed(t *testing.T) {
	for _, tt := range []struct{ why, input string }{
		{"two digits", "25\r\n"},
		{"four digits", "2500\r\n"},
		{"a letter among the digits", "2x0 ok\r\n"},
		{"a letter at their end", "25x ok\r\n"},
		{"neither space nor dash after the code", "250ok\r\n"},
		{"a tab after the code", "250\tok\r\n"},
		{"1yz is not of SMTP", "100 continue\r\n"},
		{"6yz is not of SMTP", "600 ok\r\n"},
		{"a sign, which strconv.Atoi would take", "+25 ok\r\n"},
		{"a space first", " 250 ok\r\n"},
		{"a line without a code that stands before a reply", "ok\r\n250 ok\r\n"},
		{"and after empty lines", "\r\n\r\nok\r\n"},
		{"another protocol", "HTTP/1.1 400 Bad Request\r\n"},
		{"an alert of TLS, which has no line end", "\x15\x03\x01\x00\x02\x02\x46"},
		{"an alert of TLS with a line end in it", "\x15\x03\x01\x00\x02\x02\n"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			r, err := NewReplyReader(strings.NewReader(tt.input)).ReadReply()
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("%q: got %+v, %v, want ErrMalformed", tt.input, r, err)
			}
			if r != (Reply{}) {
				t.Errorf("%q: got %+v with the error, want nothing", tt.input, r)
			}
		})
	}
}

func TestMalformedReplyIsQuotedButNotAtLength(t *testing.T) {
	_, err := NewReplyReader(strings.NewReader("hello\x00" + strings.Repeat("\xff", 3000) + "\r\n")).ReadReply()
	if !errors.Is(err, ErrMalformed) {
		t.Fatalf("got %v, want ErrMalformed", err)
	}
	if !strings.Contains(err.Error(), `"hello\x00`) {
		t.Errorf("got %q, which does not quote what came", err)
	}
	if len(err.Error()) > 400 {
		t.Errorf("the error has %d octets", len(err.Error()))
	}
}

func TestEndOfInputWithinAReplyIsNoCleanEnd(t *testing.T) {
	cut := errors.New("cut")
	for _, tt := range []struct {
		why, input  string
		atEnd, want error
	}{
		{"nothing at all: the relay has closed", "", io.EOF, io.EOF},
		{"within the code", "25", io.EOF, io.ErrUnexpectedEOF},
		{"before the line end", "250 ok", io.EOF, io.ErrUnexpectedEOF},
		{"between CR and LF", "250 ok\r", io.EOF, io.ErrUnexpectedEOF},
		{"between the lines of one reply", "250-ok\r\n", io.EOF, io.ErrUnexpectedEOF},
		{"within the second line", "250-ok\r\n250 ", io.EOF, io.ErrUnexpectedEOF},
		{"after an empty line: the relay has closed", "\r\n", io.EOF, io.EOF},
		{"within an empty line", "\r\n\r", io.EOF, io.ErrUnexpectedEOF},
		{"within a line without a code", "250-ok\r\n o", io.EOF, io.ErrUnexpectedEOF},
		{"another error is told as it is", "", cut, cut},
		{"within a line too", "250 ok", cut, cut},
		{"and between lines", "250-ok\r\n", cut, cut},
	} {
		t.Run(tt.why, func(t *testing.T) {
			in := io.MultiReader(strings.NewReader(tt.input), iotest.ErrReader(tt.atEnd))
			if r, err := NewReplyReader(in).ReadReply(); err != tt.want {
				t.Errorf("%q: got %+v, %v, want %v", tt.input, r, err, tt.want)
			}
		})
	}
}

// endless repeats text for ever and counts what was taken of it.
type endless struct {
	text  string
	taken int
}

func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = e.text[(e.taken+i)%len(e.text)]
	}
	e.taken += len(p)
	return len(p), nil
}

// allocated is how many bytes f allocates: the least of a few runs, since others may allocate meanwhile.
func allocated(f func()) uint64 {
	least := ^uint64(0)
	for range 3 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f()
		runtime.ReadMemStats(&after)
		least = min(least, after.TotalAlloc-before.TotalAlloc)
	}
	return least
}

func TestRelayThatNeverEndsItsReplyIsCutOff(t *testing.T) {
	for _, tt := range []struct {
		why, text string
		words     string // in the error
		taken     int    // at most
		allocated uint64 // at most
	}{
		{"a line without end", "2", "16384 octets", MaxReplyLine, 64 << 10},
		{"a line without end that begins as a reply does", "250 all is well ", "16384 octets", MaxReplyLine, 64 << 10},
		{"lines without end", "250-and another\r\n", "65536 octets", MaxReply + MaxReplyLine, 64 << 10},
		{"empty lines without end", "\r\n", "65536 octets", MaxReply + MaxReplyLine, 64 << 10},
		{"lines of a code alone without end", "250-\r\n", "65536 octets", MaxReply + MaxReplyLine, 64 << 10},
		{"long lines without end", "250-" + strings.Repeat("x", 4000) + "\n", "65536 octets", MaxReply + MaxReplyLine, 64 << 10},
	} {
		t.Run(tt.why, func(t *testing.T) {
			var err error
			var in endless
			allocs := allocated(func() {
				in = endless{text: tt.text}
				_, err = NewReplyReader(&in).ReadReply()
			})
			if !errors.Is(err, ErrTooLong) || !strings.Contains(err.Error(), tt.words) {
				t.Errorf("got %v, want ErrTooLong that names %s", err, tt.words)
			}
			if in.taken > tt.taken {
				t.Errorf("%d octets were taken, more than %d", in.taken, tt.taken)
			}
			if allocs > tt.allocated {
				t.Errorf("%d bytes were allocated, more than %d", allocs, tt.allocated)
			}
		})
	}
}

func TestMillionReplyLinesAreRefusedInBoundedMemory(t *testing.T) {
	const lines = 1_000_000
	taken := allocated(func() {
		in := io.MultiReader(io.LimitReader(&endless{text: "250-x\r\n"}, lines*7), strings.NewReader("250 end\r\n"))
		if r, err := NewReplyReader(in).ReadReply(); !errors.Is(err, ErrTooLong) {
			t.Errorf("got a reply of %d octets, %v, want ErrTooLong", len(r.Text), err)
		}
	})
	if taken > 6*MaxReply {
		t.Errorf("%d bytes were allocated, more than %d", taken, 6*MaxReply)
	}
}

func TestLongestReplyIsTakenAndOneOctetMoreIsNot(t *testing.T) {
	line := func(sep string, n int) string { return "250" + sep + strings.Repeat("x", n-len("250 \r\n")) + "\r\n" }
	full := strings.Repeat(line("-", MaxReplyLine), MaxReply/MaxReplyLine-1)
	for _, tt := range []struct {
		why, input string
		want       error
	}{
		{"the longest challenge of AUTH (RFC 4954, 4)", "334 " + strings.Repeat("x", 12288-len("334 \r\n")) + "\r\n", nil},
		{"the longest line", line(" ", MaxReplyLine), nil},
		{"a longer line", line(" ", MaxReplyLine+1), ErrTooLong},
		{"the longest reply", full + line(" ", MaxReplyLine), nil},
		{"a longer reply", full + line("-", MaxReplyLine-5) + "250 \r\n", ErrTooLong},
	} {
		t.Run(tt.why, func(t *testing.T) {
			if _, err := NewReplyReader(strings.NewReader(tt.input)).ReadReply(); !errors.Is(err, tt.want) {
				t.Errorf("%d octets: got %v, want %v", len(tt.input), err, tt.want)
			}
		})
	}
}

func TestBoundedPartOfATextIsKeptAndAllOfItIsRead(t *testing.T) {
	x := func(n int) string { return strings.Repeat("x", n) }
	for _, tt := range []struct {
		why, input  string
		code        int
		short, long string // what ReadReply and ReadLong keep
	}{
		{"a text that just fits", "550 " + x(MaxText), 550, x(MaxText), x(MaxText)},
		{"one octet more", "550 " + x(MaxText+1), 550, x(MaxText), x(MaxText)},
		{"the bound is that of all lines", "550-" + x(MaxText-2) + "\r\n550 yyy", 550, x(MaxText-2) + "\ny", x(MaxText-2) + "\ny"},
		{"a line for which there is no room", "550-" + x(MaxText) + "\r\n550-y\r\n550 z", 550, x(MaxText), x(MaxText)},
		{"many lines", strings.Repeat("451-"+x(99)+"\r\n", 500) + "451 end", 451, strings.Repeat(x(99)+"\n", 21)[:MaxText], strings.Repeat(x(99)+"\n", 21)[:MaxText]},
		{"it is cut between characters", "550 " + x(MaxText-1) + "é", 550, x(MaxText - 1), x(MaxText - 1)},
		{"octets that are no characters grow before they are counted", "550 " + strings.Repeat("\x80a", MaxText/4+9), 550,
			strings.Repeat("\uFFFDa", MaxText/4), strings.Repeat("\uFFFDa", MaxText/4)},
		{"the longest challenge", "334 " + x(12288), 334, x(MaxText), x(12288)},
		{"data ends with a line", "250-" + x(4000) + "\r\n250-" + x(MaxLongText-4003) + "\r\n250 b", 250, x(MaxText), x(4000) + "\n" + x(MaxLongText-4003) + "\nb"},
		{"and a line for which there is no room is left out", "250-" + x(4000) + "\r\n250-" + x(MaxLongText-4003) + "\r\n250-bc\r\n250 d", 250, x(MaxText), x(4000) + "\n" + x(MaxLongText-4003) + "\nd"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			for _, long := range []bool{false, true} {
				in := NewReplyReader(strings.NewReader(tt.input + "\r\n250 next\r\n"))
				read, want := in.ReadReply, tt.short
				if long {
					read, want = in.ReadLong, tt.long
				}
				r, err := read()
				if err != nil || r.Code != tt.code || r.Text != want {
					t.Errorf("long=%v: got %d with %d octets of text, %v, want %d with %d", long, r.Code, len(r.Text), err, tt.code, len(want))
				}
			}
		})
	}
}

// repeat hands out the same text over and over, each time whole.
type repeat string

func (r repeat) Read(p []byte) (int, error) { return copy(p, r), nil }

func TestReplyThatCameBeforeAllocatesNothing(t *testing.T) {
	r := NewReplyReader(repeat("250 2.1.0 Sender address accepted\r\n250 2.1.5 Recipient address accepted\r\n354 Continue\r\n"))
	if n := testing.AllocsPerRun(300, func() {
		if _, err := r.ReadReply(); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("got %v allocations for each reply, want none", n)
	}
}

func TestReplyOutlivesThoseReadAfterIt(t *testing.T) {
	const n = 20
	var input strings.Builder
	for i := range n {
		fmt.Fprintf(&input, "250-line\r\n250 2.0.0 Ok: queued as %d\r\n", i%7)
	}
	r := NewReplyReader(strings.NewReader(input.String()))
	var got []Reply
	for range n {
		reply, err := r.ReadReply()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, reply)
	}
	for i, reply := range got {
		if want := fmt.Sprintf("line\nOk: queued as %d", i%7); reply.Text != want {
			t.Errorf("reply %d: got %q, want %q", i, reply.Text, want)
		}
	}
}

func TestBufferedCountsWhatStandsBehindAReply(t *testing.T) {
	// After the reply to STARTTLS it must be 0, else somebody has put words into the relay's mouth (CVE-2011-0411).
	r := NewReplyReader(strings.NewReader("220 Begin TLS negotiation now\r\n250 injected\r\n"))
	if _, err := r.ReadReply(); err != nil {
		t.Fatal(err)
	}
	if got, want := r.Buffered(), len("250 injected\r\n"); got != want {
		t.Errorf("got %d, want %d", got, want)
	}
	if _, err := r.ReadReply(); err != nil {
		t.Fatal(err)
	}
	if got := r.Buffered(); got != 0 {
		t.Errorf("at the end: got %d, want 0", got)
	}
}

// enhancedCode is what net/textproto leaves in the text and ReadReply cuts off.
var enhancedCode = regexp.MustCompile(`^([245])\.\d{1,3}\.\d{1,3}(?: |$)`)

// codeLine is a line that begins with a code: the last of a reply, unless a dash follows.
var codeLine = regexp.MustCompile(`^([2-5]\d\d)([ -]|\r?\n?$)`)

// FuzzReadReply holds the parser to what it promises of any input, to itself, and to net/textproto.
func FuzzReadReply(f *testing.F) {
	for _, seed := range []string{
		// SendGrid.
		"220 SG ESMTP service ready at ismtpd0001p1iad2.sendgrid.net\r\n",
		"220 Begin TLS negotiation now\r\n",
		"334 VXNlcm5hbWU6\r\n334 UGFzc3dvcmQ6\r\n235 Authentication successful\r\n",
		"250 Sender address accepted\r\n250 Recipient address accepted\r\n354 Continue\r\n250 Ok: queued as _bXzmsKbSfuMyZzZmB0wLg\r\n221 See you later\r\n",
		"451 Authentication failed: Maximum credits exceeded\r\n",
		"550 Unauthenticated senders not allowed\r\n",
		"550 The from address does not match a verified Sender Identity. Mail cannot be sent until this error is resolved.\r\n",
		// Amazon SES.
		"421 Too many concurrent SMTP connections\r\n",
		"421 Connection closed by server. Maximum message count per session reached.\r\n",
		"454 Throttling failure: Maximum sending rate exceeded\r\n",
		"451 4.4.2 Timeout waiting for data from client\r\n",
		"250 Ok 010001897a5b6c7d-0e1f2a3b-4c5d-6e7f-8a9b-0c1d2e3f4a5b-000000\r\n",
		// Mailtrap, Gmail, Microsoft 365, SocketLabs.
		"535 5.7.8 Too many connections per account\r\n",
		"550 5.7.0 Requested action not taken: too many emails per second\r\n",
		"421 4.7.0 Try again later, closing connection\r\n451 4.4.2 Timeout - closing connection\r\n",
		"450-4.2.1 Peak SMTP relay limit exceeded for customer. This is a temporary\r\n450 4.2.1 error.\r\n",
		"432 4.3.2 Concurrent connections limit exceeded.\r\n554 5.2.2 mailbox full\r\n",
		"421 4.4.5 - Too many connections from your host\r\n452 5.5.3 - Too many recipients\r\n",
		// Postfix, Exim, OpenSMTPD, Haraka, smtp-server.
		"220 relay.example ESMTP Postfix\r\n250-relay.example\r\n250-PIPELINING\r\n250-SIZE 10240000\r\n250-ETRN\r\n250-ENHANCEDSTATUSCODES\r\n250-8BITMIME\r\n250-DSN\r\n250-SMTPUTF8\r\n250 CHUNKING\r\n",
		"421 4.4.2 relay.example Error: timeout exceeded\r\n554 5.5.0 Error: SMTP protocol synchronization\r\n",
		"421 relay.example: Too many concurrent SMTP connections; please try again later.\r\n421 too many messages in this connection\r\n",
		"503-All RCPT commands were rejected with this error:\r\n503-550 no such user\r\n503 Valid RCPT command must precede DATA\r\n",
		"500 5.5.1 Invalid command: Pipelining not supported\r\n",
		"503 pipelined after end of DATA\r\n421 relay.example You talk too soon\r\n",
		// What is odd.
		"250-a\r\n  b\r\n\r\n250 c\r\n", "\r\n \r\n250 ok\r\n\r\n", "220-mx\r\n521 5.7.1 no\r\n", "250 mx\r\n250 8BITMIME\r\n",
		"250\r\n", "250-a\n250\n", "250-a\r\n251 b\r\n", "250 caf\xe9\r\r\n", "334 \r\n", "\r\n", "250-5.1.1 a\r\n250-2.0.0 b\r\n250 2.1.5",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		whole := &counted{r: strings.NewReader(string(data))}
		replies, byByte := NewReplyReader(whole), NewReplyReader(iotest.OneByteReader(strings.NewReader(string(data))))
		for begin := 0; ; {
			got, err := replies.ReadReply()
			same, sameErr := byByte.ReadReply()
			if got != same || fmt.Sprint(err) != fmt.Sprint(sameErr) {
				t.Fatalf("got %+v, %v at once and %+v, %v byte by byte", got, err, same, sameErr)
			}
			if err != nil {
				if got != (Reply{}) {
					t.Errorf("got %+v with the error %v", got, err)
				}
				if rest := data[begin:]; err == io.EOF && (len(bytes.Trim(rest, " \t\r\n")) > 0 || len(rest) > 0 && rest[len(rest)-1] != '\n') {
					t.Errorf("a clean end after %d of %d octets", begin, len(data))
				}
				return
			}
			end := whole.n - replies.Buffered()
			checkReply(t, got, string(data[begin:end]))
			begin = end
		}
	})
}

// counted counts what is read.
type counted struct {
	r io.Reader
	n int
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += n
	return n, err
}

// checkReply checks what must hold of any reply, which was parsed of wire.
func checkReply(t *testing.T, r Reply, wire string) {
	t.Helper()
	if r.Code < 200 || r.Code > 599 {
		t.Errorf("code %d of %q", r.Code, wire)
	}
	if c := r.Enhanced[0]; c != 0 && (c != r.Class() || c == 3) || c == 0 && r.Enhanced != [3]int{} {
		t.Errorf("enhanced code %v with code %d of %q", r.Enhanced, r.Code, wire)
	}
	if !utf8.ValidString(r.Text) {
		t.Errorf("text %q of %q is not UTF-8", r.Text, wire)
	}
	if len(wire) > MaxReply {
		t.Errorf("a reply of %d octets", len(wire))
	}
	if again := encodeReply(r); len(again) <= MaxReplyLine {
		if got, err := NewReplyReader(strings.NewReader(again)).ReadReply(); err != nil || got != r {
			t.Errorf("%+v of %q, written and parsed again: got %+v, %v", r, wire, got, err)
		}
	}

	// One reply ends with the first line that can be the last of one, and that is the line whose code it has: no octet of
	// another reply is in it, and none of it is left for another.
	seen := strings.SplitAfter(strings.TrimSuffix(wire, "\n"), "\n")
	for i, line := range seen {
		m := codeLine.FindStringSubmatch(line)
		if last := i == len(seen)-1; last != (m != nil && m[2] != "-") || last && m[1] != fmt.Sprint(r.Code) {
			t.Errorf("%+v of %q: line %d is %q", r, wire, i, line)
		}
		if m != nil && m[1] != fmt.Sprint(r.Code) || m == nil && strings.Contains(line, "\r\r") {
			return // net/textproto keeps other codes in the text, and cuts off more than one CR
		}
	}

	// net/textproto keeps enhanced codes in the text and wants a space or dash after each code; it goes on after a line
	// of another code, which is why it sees only what ReadReply took.
	code, text, err := textproto.NewReader(bufio.NewReader(strings.NewReader(wire))).ReadResponse(0)
	if err != nil {
		return
	}
	if code != r.Code {
		t.Errorf("%q: got code %d, net/textproto %d", wire, r.Code, code)
	}
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		if m := enhancedCode.FindStringSubmatch(line); m != nil && m[1] == fmt.Sprint(code/100) {
			lines[i] = line[len(m[0]):]
		}
	}
	want := strings.ToValidUTF8(strings.Join(lines, "\n"), "\uFFFD")
	if kept := strings.TrimRight(r.Text, "\uFFFD"); len(want) > MaxText && len(r.Text) <= MaxText+len("\uFFFD") && strings.HasPrefix(want, kept) {
		return // its beginning is kept
	}
	if r.Text != want {
		t.Errorf("%q: got text %q, net/textproto %q", wire, r.Text, want)
	}
}

// encodeReply writes r as a relay does.
func encodeReply(r Reply) string {
	var b strings.Builder
	lines := strings.Split(r.Text, "\n")
	for i, line := range lines {
		sep := "-"
		if i == len(lines)-1 {
			sep = " "
		}
		if r.Enhanced != [3]int{} {
			line = fmt.Sprintf("%d.%d.%d %s", r.Enhanced[0], r.Enhanced[1], r.Enhanced[2], line)
		}
		fmt.Fprintf(&b, "%d%s%s\r\n", r.Code, sep, line)
	}
	return b.String()
}

func BenchmarkReadReply(b *testing.B) {
	for _, bb := range []struct{ name, text string }{
		{"same", "250 2.1.0 Sender address accepted\r\n"},
		{"ehlo", "250-smtp.sendgrid.net\r\n250-8BITMIME\r\n250-PIPELINING\r\n250-SIZE 31457280\r\n250-STARTTLS\r\n250-AUTH PLAIN LOGIN\r\n250 AUTH=PLAIN LOGIN\r\n"},
	} {
		b.Run(bb.name, func(b *testing.B) {
			r := NewReplyReader(repeat(bb.text))
			b.SetBytes(int64(len(bb.text)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := r.ReadReply(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	// As replies to final dots are: each with an identifier of its own.
	b.Run("different", func(b *testing.B) {
		var text strings.Builder
		for i := range 16 {
			fmt.Fprintf(&text, "250 2.0.0 Ok: queued as %022d\r\n", i)
		}
		r := NewReplyReader(repeat(text.String()))
		b.SetBytes(int64(text.Len() / 16))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := r.ReadReply(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
