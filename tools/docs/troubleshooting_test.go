// Keeps docs/troubleshooting.md complete: each text of an error in the source has an entry there, and each entry's text is in the
// source.
package docs

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const troubleshooting = "docs/troubleshooting.md"

// sources are the packages whose errors a user of the library can get. The packages of this module that they import are added.
var sources = []string{"", "smtp", "smtpapi", "preset"}

// A text of an error is a string of two words or more, or any string that makes an error, except in the places below. So a new
// text is found wherever it is written: in a call, a return, a table or a constant.
var (
	// makers are calls whose strings are errors even if they have a single word.
	makers = []string{"errors.New", "fmt.Errorf", "mistake", "unfit", "notOffered"}
	// readers are calls that compare, match or print their strings, or end the program with them.
	readers = []string{"panic", "words", "queueID", "regexp.MustCompile", "strings.HasPrefix", "strings.TrimPrefix", "strings.Contains",
		"log"}
	// fields are fields of composite literals that hold no error.
	fields = []string{"source"}
	// others are single strings.
	others = []string{
		"remote error",                                                                       // crypto/tls writes it
		"first path segment", "invalid character", "invalid port", "missing protocol scheme", // net/url writes them
		"net/url: invalid control character", "net/url: invalid userinfo", // also net/url
		"BDAT 8 (out of order, to see how the relay refuses it), RSET", // a line of a Trace
		"and … more", "(and … more)", "queue ID", "queued as", // parts of a list of addresses, and of a receipt
		"not accepted", "by port", // names of constants
		"TLS handshake", "sending the body", "end of the message", "final dot", // steps: the page has a section for each
		"checking the message", "waiting for a connection",
	}
)

var (
	verb      = regexp.MustCompile(`%[+#]?[0-9.]*[a-zA-Z]`)
	someWord  = regexp.MustCompile(`[A-Za-z]*[a-z][A-Za-z]*`)
	leading   = regexp.MustCompile("^- ((?:`[^`]+`(?:, |,\n  )?)+):")
	listItem  = regexp.MustCompile(`(?m)^- .*(?:\n  .*)*`)
	codeSpan  = regexp.MustCompile("`([^`]+)`")
	endsOfOne = regexp.MustCompile(`^(?:…?[;:] )+|(?:[;:] …?)+$|^smtpapi: `)
)

// plain is a text as an entry writes it: "…" replaces each verb.
func plain(format string) string {
	text := strings.ReplaceAll(format, "%%", "\x00")
	text = strings.ReplaceAll(verb.ReplaceAllString(text, "…"), "\x00", "%")
	for {
		shorter := strings.TrimSpace(endsOfOne.ReplaceAllString(text, ""))
		if shorter == text {
			return text
		}
		text = shorter
	}
}

// errorTexts returns the texts of errors in the source, each with a position.
func errorTexts(t *testing.T) map[string]string {
	t.Helper()
	texts := map[string]string{}
	files := token.NewFileSet()
	todo, done := slices.Clone(sources), map[string]bool{}
	for len(todo) > 0 {
		dir := todo[0]
		todo = todo[1:]
		if done[dir] {
			continue
		}
		done[dir] = true
		names, err := filepath.Glob(filepath.Join("../..", dir, "*.go"))
		if err != nil || len(names) == 0 {
			t.Fatalf("%q has no Go files: %v", dir, err)
		}
		for _, name := range names {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			file, err := parser.ParseFile(files, name, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range file.Imports {
				if own, ok := strings.CutPrefix(strings.Trim(i.Path.Value, `"`), module); ok {
					todo = append(todo, strings.TrimPrefix(own, "/"))
				}
			}
			collect(file, func(at token.Pos, text string) {
				texts[text] = strings.TrimPrefix(files.Position(at).String(), "../../")
			})
		}
	}
	return texts
}

// collect calls found with each text of an error in file.
func collect(file *ast.File, found func(at token.Pos, text string)) {
	var stack []ast.Node
	ast.Inspect(file, func(n ast.Node) bool {
		if n == nil {
			stack = stack[:len(stack)-1]
			return true
		}
		if skipped(stack, n) {
			return false
		}
		text, ok := stringOf(n)
		if !ok {
			stack = append(stack, n)
			return true
		}
		text = plain(text)
		words := len(someWord.FindAllString(text, -1))
		if (words >= 2 && strings.Contains(text, " ") || words >= 1 && makes(stack)) && !slices.Contains(others, text) {
			found(n.Pos(), text)
		}
		return false
	})
}

// stringOf is the text of a string literal, or of several joined by +; other operands become "…".
func stringOf(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.BasicLit:
		if n.Kind == token.STRING {
			text, err := strconv.Unquote(n.Value)
			return text, err == nil
		}
	case *ast.BinaryExpr:
		left, leftOK := stringOf(n.X)
		right, rightOK := stringOf(n.Y)
		if n.Op != token.ADD || !leftOK && !rightOK {
			return "", false
		}
		for ok, text := range map[*bool]*string{&leftOK: &left, &rightOK: &right} {
			if !*ok {
				*text = "…"
			}
		}
		return left + right, true
	}
	return "", false
}

// skipped reports whether nothing in n, with the parents in stack, is an error.
func skipped(stack []ast.Node, n ast.Node) bool {
	switch n := n.(type) {
	case *ast.ImportSpec:
		return true
	case *ast.Field:
		return n.Tag != nil
	case *ast.FuncDecl:
		return slices.Contains([]string{"String", "LogValue", "Format", "MarshalJSON"}, n.Name.Name)
	case *ast.KeyValueExpr:
		key, ok := n.Key.(*ast.Ident)
		return ok && slices.Contains(fields, key.Name)
	case *ast.CallExpr:
		return slices.Contains(readers, callee(n))
	}
	return false
}

// makes reports whether the string below stack is an argument of a call that makes an error.
func makes(stack []ast.Node) bool {
	call, ok := stack[len(stack)-1].(*ast.CallExpr)
	return ok && slices.Contains(makers, callee(call))
}

func callee(call *ast.CallExpr) string {
	switch f := call.Fun.(type) {
	case *ast.Ident:
		return f.Name
	case *ast.SelectorExpr:
		if x, ok := f.X.(*ast.Ident); ok {
			return x.Name + "." + f.Sel.Name
		}
		return f.Sel.Name
	}
	return ""
}

func TestEachErrorTextIsExplained(t *testing.T) {
	page, err := os.ReadFile("../../" + troubleshooting)
	if err != nil {
		t.Fatal(err)
	}
	texts := errorTexts(t)
	entries, mentioned := map[string]bool{}, map[string]bool{}
	for _, item := range listItem.FindAllString(string(page), -1) {
		head := leading.FindStringSubmatch(item)
		if head == nil {
			continue
		}
		if !strings.Contains(item[len(head[0]):], "Cure:") {
			t.Errorf("%.80s: no remedy", item)
		}
		for _, m := range codeSpan.FindAllStringSubmatch(head[1], -1) {
			if entries[m[1]] {
				t.Errorf("%q has two entries", m[1])
			}
			entries[m[1]] = true
		}
		for _, m := range codeSpan.FindAllStringSubmatch(item, -1) {
			mentioned[m[1]] = true
		}
	}
	for _, text := range slices.Sorted(maps.Keys(texts)) {
		if !mentioned[text] {
			t.Errorf("%s: no entry for\n\t`%s`", texts[text], text)
		}
	}
	for _, text := range slices.Sorted(maps.Keys(entries)) {
		if texts[text] == "" {
			t.Errorf("%s: no error has the text\n\t`%s`", troubleshooting, text)
		}
	}
	t.Logf("%d texts, %d entries", len(texts), len(entries))
}

func TestErrorTextsAreFoundEverywhere(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "a.go", `package a
import "not an error"
var errA = errors.New("one")
const hint = "two words"
var table = []struct{ source, say string }{{source: "no error", say: "in a table"}}
func (t T) String() string { return "no error here" }
func f() string {
	panic("no error either")
	if strings.HasPrefix(s, "is compared") {
		return "given back " + name + " at last"
	}
	return fmt.Errorf("%w; what %s does: %v", err, x, y)
}`, 0)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	collect(file, func(_ token.Pos, text string) { got = append(got, text) })
	if want := []string{"one", "two words", "in a table", "given back … at last", "what … does"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if text := fmt.Sprintf("%q", plain("a 100%% %s")); text != `"a 100% …"` {
		t.Error(text)
	}
}
