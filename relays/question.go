package main

// What the relay replies to the client's probe for refused chunks, as asked by the suite itself: the suite does not trust the
// client here.

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"slices"
	"strings"
	"time"
)

// habit is what a relay does when it gets a chunk out of order, then RSET.
type habit struct {
	offers  bool     // CHUNKING, and PIPELINING, without which no client sends a body ahead
	replies []string // to the chunk, to what it read as commands, to RSET
	after   string   // how the connection continues: the reply to NOOP, or how it ended
	took    time.Duration
}

// discards reports whether the relay has shown that it discards the octets of a chunk that it refuses.
func (h habit) discards() bool {
	return len(h.replies) == 2 && h.replies[0][0] >= '4' && h.replies[1][0] == '2'
}

func (h habit) String() string {
	if !h.offers {
		return "does not offer CHUNKING"
	}
	return fmt.Sprintf("%q, then %s (after %d ms)", h.replies, h.after, h.took.Milliseconds())
}

// askAboutChunks probes the relay on a separate connection.
func askAboutChunks(r *running) (habit, error) {
	var h habit
	c, err := net.Dial("tcp", address(r.Plain))
	if err != nil {
		return h, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	replies := textproto.NewReader(bufio.NewReader(c))
	if _, _, err := replies.ReadResponse(220); err != nil {
		return h, err
	}
	fmt.Fprintf(c, "EHLO client.example\r\n")
	_, extensions, err := replies.ReadResponse(250)
	if err != nil {
		return h, err
	}
	offered := strings.Fields(strings.ToUpper(extensions))
	h.offers = slices.Contains(offered, "CHUNKING") && slices.Contains(offered, "PIPELINING")
	if !h.offers {
		fmt.Fprintf(c, "QUIT\r\n")
		return h, nil
	}
	began := time.Now()
	fmt.Fprintf(c, "BDAT 8\r\nXCHUNK\r\nRSET\r\n")
	for {
		code, text, err := replies.ReadResponse(0)
		h.took = time.Since(began)
		if err != nil {
			h.after = ended(err)
			return h, nil
		}
		h.replies = append(h.replies, fmt.Sprintf("%d %s", code, text))
		if code/100 == 2 { // to RSET: nothing else gets a 2xx
			break
		}
	}
	fmt.Fprintf(c, "NOOP\r\n")
	code, text, err := replies.ReadResponse(0)
	if err != nil {
		h.after = ended(err)
		return h, nil
	}
	h.after = fmt.Sprintf("%d %s to NOOP", code, text)
	fmt.Fprintf(c, "QUIT\r\n")
	_, err = io.Copy(io.Discard, c)
	return h, err
}

func ended(err error) string {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "it hangs up"
	}
	return err.Error()
}
