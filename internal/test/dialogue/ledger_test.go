// Parses the traffic of a connection: the facts that the rules of cut_test.go are checked against.
package dialogue

import (
	"strconv"
	"strings"
)

// A ledger parses the traffic of one connection: which transactions were begun, which final dots were written in full, what the
// replies were. It matches replies to commands by counting, as a client must.
type ledger struct {
	in       string // sent by the client, not parsed yet
	out      string // sent by the relay, not parsed yet
	within   bool   // a multiline reply has begun
	yes      bool   // one of its lines was positive
	waiting  []waiting
	held     bool // the client's next data has no meaning before a reply
	inData   bool
	inAuth   bool
	inChunk  int  // octets of it still missing
	last     bool // the chunk is the last one
	starting bool // the relay has accepted STARTTLS
	prompts  int  // challenges that AUTH still needs
	lost     bool // the relay's data does not arrive
	txs      []*transaction
	event    func() int // counts the events of the dialogue
}

// A waiting command has no reply yet.
type waiting struct {
	verb string
	tx   *transaction
	rcpt int
}

type transaction struct {
	from  string
	mail  int // the reply that arrived; 0 means none
	to    []string
	rcpt  []int  // replies, in the order of to
	heard []int  // those that arrived; 0 means none
	data  int    // when 354 was sent, by the dialogue's count of events; 0 means never
	bdat  bool   // the body is sent in chunks
	body  string // as sent, including the final dot
	dot   bool   // the final dot or the last chunk was written in full
	short bool   // only its line end is missing, if this is the end of the body
	final int    // the reply to it: 0 if none arrived, -1 for something that is not a reply
	slow  bool   // final says that messages come too fast
	when  int    // when final was sent, by the dialogue's count of events
}

func (x *transaction) anyAccepted() bool {
	for _, code := range x.rcpt {
		if code/100 == 2 {
			return true
		}
	}
	return false
}

// possible reports whether, as far as the client can know, a recipient of x may have got the message.
func (x *transaction) possible(rcpt int) bool {
	open := func(code int) bool { return code == 0 || code/100 == 2 }
	// An odd relay may deliver a body that was sent ahead of the replies, even to a recipient whose sender was refused.
	odd := x.bdat && x.heard[rcpt]/100 == 2
	return open(x.heard[rcpt]) && (open(x.mail) || odd)
}

func (l *ledger) expect(verb string, tx *transaction) {
	l.waiting = append(l.waiting, waiting{verb: verb, tx: tx})
}

func (l *ledger) tx() *transaction {
	if len(l.txs) == 0 {
		return nil
	}
	return l.txs[len(l.txs)-1]
}

// secured discards the plaintext.
func (l *ledger) secured() { l.in, l.starting = "", false }

func (l *ledger) hear(text []byte) {
	l.in += string(text)
	for !l.held && l.in != "" {
		if l.inData {
			x := l.tx()
			body, _, whole := strings.Cut("\r\n"+l.in, "\r\n.\r\n")
			if !whole {
				x.body = l.in
				rest := strings.TrimSuffix("\r\n"+l.in, "\r")
				if x.short = strings.HasSuffix(rest, "\r\n."); x.short {
					x.body = rest[2:] + "\r\n"
				}
				return
			}
			x.body = (body + "\r\n.\r\n")[2:]
			x.dot = true
			l.in = l.in[len(x.body):]
			l.inData = false
			l.expect(".", x)
			continue
		}
		if l.inChunk > 0 {
			n := min(l.inChunk, len(l.in))
			l.chunk(l.in[:n])
			l.in = l.in[n:]
			continue
		}
		line, rest, whole := strings.Cut(l.in, "\r\n")
		if !whole {
			if x := l.tx(); x != nil && x.bdat {
				x.short = strings.TrimSuffix(l.in, "\r") == "BDAT 0 LAST"
			}
			return
		}
		l.in = rest
		l.command(line)
	}
}

// chunk takes octets of a chunk.
func (l *ledger) chunk(text string) {
	x := l.tx()
	l.inChunk -= len(text)
	if x != nil {
		x.body += text
	}
	switch {
	case l.inChunk > 0:
	case x == nil:
		l.expect("BDAT", nil)
	case l.last:
		x.dot = true
		l.expect(".", x)
	default:
		l.expect("BDAT", x)
	}
}

func (l *ledger) command(line string) {
	if l.inAuth {
		l.inAuth = false
		l.held = true
		l.expect("AUTH", nil)
		return
	}
	verb, arg, _ := strings.Cut(line, " ")
	verb = strings.ToUpper(verb)
	path := func() string {
		_, p, _ := strings.Cut(arg, "<")
		p, _, _ = strings.Cut(p, ">")
		return p
	}
	switch verb {
	case "MAIL":
		l.txs = append(l.txs, &transaction{from: path()})
		l.expect(verb, l.tx())
	case "RCPT":
		x := l.tx()
		if x == nil {
			return
		}
		x.to, x.rcpt, x.heard = append(x.to, path()), append(x.rcpt, 0), append(x.heard, 0)
		l.waiting = append(l.waiting, waiting{verb, x, len(x.to) - 1})
	case "DATA":
		l.expect(verb, l.tx())
		l.held = true
	case "BDAT":
		x := l.tx()
		size, last, _ := strings.Cut(arg, " ")
		n, err := strconv.Atoi(size)
		if err != nil {
			l.expect(verb, x)
			return
		}
		if x != nil && x.data == 0 {
			x.data, x.bdat = l.event(), true
		}
		l.inChunk, l.last = n, last == "LAST"
		l.chunk("")
	case "STARTTLS":
		l.expect(verb, nil)
		l.held = true
	case "AUTH":
		mechanism, initial, ok := strings.Cut(arg, " ")
		l.prompts = 1
		if mechanism == "LOGIN" {
			l.prompts = 2
		}
		if ok && initial != "" {
			l.prompts--
		}
		l.held = l.prompts > 0
		l.expect(verb, nil)
	default:
		l.expect(verb, nil)
	}
}

func (l *ledger) say(text string) {
	l.out += text
	for {
		line, rest, whole := strings.Cut(l.out, "\n")
		if !whole {
			return
		}
		l.out = rest
		code := -1
		line = strings.TrimSuffix(line, "\r")
		if len(line) >= 3 && line[0] >= '2' && line[0] <= '5' && strings.Trim(line[1:3], "0123456789") == "" {
			if len(line) > 3 && line[3] == '-' {
				l.within, l.yes = true, l.yes || line[0] == '2'
				continue
			}
			if len(line) == 3 || line[3] == ' ' {
				code = int(line[0]-'0')*100 + int(line[1]-'0')*10 + int(line[2]-'0')
			}
		}
		if code < 0 && (l.within || strings.TrimSpace(line) == "") {
			continue // a line without a code, or an empty one between replies
		}
		if code == 421 && l.yes {
			code = -1 // the relay's closing 421 interrupts its positive reply
		}
		l.within, l.yes = false, false
		l.replied(code, strings.Contains(line, "sending rate"))
	}
}

func (l *ledger) replied(code int, slow bool) {
	if len(l.waiting) == 0 {
		return // unexpected
	}
	w := l.waiting[0]
	l.waiting = l.waiting[1:]
	switch w.verb {
	case "MAIL":
		if !l.lost {
			w.tx.mail = code
		}
	case "RCPT":
		if w.tx.rcpt[w.rcpt] = code; !l.lost {
			w.tx.heard[w.rcpt] = code
		}
	case "DATA":
		l.held = false
		if code == 354 && w.tx != nil {
			l.inData = true
			w.tx.data = l.event()
		}
	case ".":
		if !l.lost {
			w.tx.final, w.tx.slow, w.tx.when = code, slow, l.event()
		}
	case "STARTTLS":
		l.held = false
		l.starting = code == 220
	case "AUTH":
		l.held = false
		l.inAuth = code == 334
	}
	l.hear(nil)
}
