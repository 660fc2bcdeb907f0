// Package docs tests the Markdown files of this repository: the files, tests and make targets that they name exist, their links
// work, and their Go code compiles. It has no code of its own.
//
// A block of Go that begins with "package" is a file, and so is one of declarations. Any other block is the body of a function,
// whose parameters and results are in a comment right above the block, where readers of the page do not see them:
//
//	<!-- go: (ctx context.Context, m smtprelay.Message) error -->
//
// Import lines may precede the declarations or the statements, or follow the results in that comment; what they import must be in
// this module's go.mod. The packages in the table named imported are added, except to a file. Unused variables and imports are
// allowed.
//
// A block marked as diff with such a comment above it is two blocks of Go: before and after the change.
package docs

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/tools/go/packages"
)

const module = "github.com/smtprelay/smtprelay"

// imported are the packages that blocks of Go may use without an import line. No two have the same name.
var imported = []string{
	"bytes", "context", "crypto/tls", "crypto/x509", "encoding/json", "errors", "fmt", "io", "log", "log/slog", "maps", "net",
	"net/http", "net/mail", "net/textproto", "os", "os/signal", "slices", "strings", "sync", "syscall", "testing", "time",
	module, module + "/preset", module + "/smtpapi", module + "/smtptest",
}

var (
	code     = regexp.MustCompile("`([^`\n]+)`")
	link     = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading  = regexp.MustCompile(`(?m)^#+ +(.+)$`)
	fence    = regexp.MustCompile("(?ms)^```([a-z]*)[^\n]*\n(.*?)^```$")
	goBlock  = regexp.MustCompile("(?ms)^(?:<!-- go: ([^\n]*) -->\n+)?```go\n(.*?)^```$")
	goDiff   = regexp.MustCompile("(?ms)^<!-- go: ([^\n]*) -->\n+```diff\n(.*?)^```$")
	imports  = regexp.MustCompile(`\A(?:import (?:"[^"\n]+"|\((?:\n[^)\n]*)*\n\))\n+)+`)
	quoted   = regexp.MustCompile(`"([^"\n]+)"`)
	testName = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark|Example)[A-Z]\w+`)
	testFunc = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark|Example)\w+)\(`)
	goFile   = regexp.MustCompile(`^[\w./*{}-]+\.(?:go|md|txt)$`)
	target   = regexp.MustCompile(`^make ([a-z]+)`)
)

// tree is the content of the repository, by path from its root with slashes.
type tree struct {
	files []string
	pages map[string]string // Markdown and GitHub's YAML, with their text
	tests map[string]bool   // functions in test files
}

func read(t *testing.T) tree {
	t.Helper()
	all := tree{pages: map[string]string{}, tests: map[string]bool{}}
	root := os.DirFS("../..")
	err := fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == ".git" || d.Name() == "node_modules"):
			return fs.SkipDir
		}
		all.files = append(all.files, name)
		isTest := strings.HasSuffix(name, "_test.go")
		isPage := strings.HasSuffix(name, ".md") || strings.HasPrefix(name, ".github/") && strings.HasSuffix(name, ".yml")
		if d.IsDir() || !isTest && !isPage {
			return nil
		}
		text, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		if isPage {
			all.pages[name] = string(text)
		}
		for _, m := range testFunc.FindAllSubmatch(text, -1) {
			all.tests[string(m[1])] = all.tests[string(m[1])] || isTest
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// has reports whether there is a file or folder with this name, which may be a pattern.
func (all tree) has(name string) bool {
	name = strings.TrimSuffix(name, "/")
	return slices.ContainsFunc(all.files, func(f string) bool {
		ok, err := path.Match(name, f)
		return ok && err == nil
	})
}

// hasScript reports whether a folder of test data has a file with this name.
func (all tree) hasScript(name string) bool {
	return slices.ContainsFunc(all.files, func(f string) bool { return strings.Contains(f, "testdata/") && path.Base(f) == name })
}

// prose returns a page without its fenced blocks.
func prose(text string) string { return fence.ReplaceAllString(text, "") }

func TestFilesNamedInArchitectureExist(t *testing.T) {
	all := read(t)
	mod, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(all.pages["ARCHITECTURE.md"]) {
		if !strings.HasPrefix(line, "|") {
			continue
		}
		for _, m := range code.FindAllStringSubmatch(line, -1) {
			name := m[1]
			if strings.Contains(string(mod), name) || !goFile.MatchString(name) && !regexp.MustCompile(`^[\w.-]+/[\w./-]*$`).MatchString(name) {
				continue
			}
			if !all.has(name) {
				t.Errorf("ARCHITECTURE.md: %s does not exist", name)
			}
		}
	}
}

// examples are names that pages use to show how tests are named.
var examples = []string{"TestSendIsNotRepeatedAfterFinalDot", "TestBroken"}

func TestTestsNamedInPagesExist(t *testing.T) {
	all := read(t)
	for page, text := range all.pages {
		for _, m := range code.FindAllStringSubmatch(prose(text), -1) {
			for _, name := range testName.FindAllString(m[1], -1) {
				if !all.tests[name] && !slices.Contains(examples, name) {
					t.Errorf("%s: %s does not exist", page, name)
				}
			}
			if page == "TESTING.md" && goFile.MatchString(m[1]) && !all.has(m[1]) && !all.hasScript(m[1]) {
				t.Errorf("%s: %s does not exist", page, m[1])
			}
		}
	}
}

// The table of complaints in TESTING.md gives for each a reason why it cannot happen in this module, or the tests and transcripts
// that cover it; that these exist is tested above.
func TestEachComplaintIsCovered(t *testing.T) {
	_, section, found := strings.Cut(read(t).pages["TESTING.md"], "\n## Complaints of other clients\n")
	if !found {
		t.Fatal("TESTING.md has no section on the complaints of other clients")
	}
	number := 0
	for _, m := range regexp.MustCompile(`(?m)^\| (\d+) \|.*\| ([^|]*) \|$`).FindAllStringSubmatch(section, -1) {
		number++
		if m[1] != strconv.Itoa(number) {
			t.Errorf("complaint %d is numbered %s", number, m[1])
		}
		if strings.TrimSpace(m[2]) == "" {
			t.Errorf("complaint %d has no test and no reason", number)
		}
	}
	if !strings.Contains(section, fmt.Sprintf(", %d in all,", number)) {
		t.Errorf("TESTING.md does not say that the complaints are %d in all", number)
	}
}

func TestMakeTargetsNamedInPagesExist(t *testing.T) {
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	for page, text := range read(t).pages {
		for _, m := range code.FindAllStringSubmatch(prose(text), -1) {
			if name := target.FindStringSubmatch(m[1]); name != nil && !strings.Contains(string(makefile), "\n"+name[1]+":") {
				t.Errorf("%s: the Makefile has no target %s", page, name[1])
			}
		}
	}
}

// Links to this repository on GitHub count as relative.
func TestLinksHaveATarget(t *testing.T) {
	all := read(t)
	own := regexp.MustCompile(`https://` + module + `/(?:blob|tree)/main/([^\s)"']+)`)
	for page, text := range all.pages {
		var links []string
		for _, m := range link.FindAllStringSubmatch(prose(text), -1) {
			if !strings.Contains(m[1], ":") {
				links = append(links, m[1])
			}
		}
		for _, m := range own.FindAllStringSubmatch(text, -1) {
			links = append(links, "/"+m[1])
		}
		for _, l := range links {
			file, anchor, _ := strings.Cut(l, "#")
			switch {
			case file == "":
				file = page
			case file[0] == '/':
				file = file[1:]
			default:
				file = path.Join(path.Dir(page), file)
			}
			if !slices.Contains(all.files, strings.TrimSuffix(file, "/")) {
				t.Errorf("%s: the file of %s does not exist", page, l)
			} else if anchor != "" && !slices.Contains(anchors(all.pages[file]), anchor) {
				t.Errorf("%s: the heading of %s does not exist", page, l)
			}
		}
	}
}

// anchors returns the names that GitHub gives to the headings of a page.
func anchors(text string) []string {
	var names []string
	seen := map[string]int{}
	for _, m := range heading.FindAllStringSubmatch(prose(text), -1) {
		name := strings.ToLower(regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`).ReplaceAllString(m[1], "$1"))
		name = strings.ReplaceAll(regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(name, ""), " ", "-")
		if n := seen[name]; n > 0 {
			names = append(names, fmt.Sprintf("%s-%d", name, n))
		} else {
			names = append(names, name)
		}
		seen[name]++
	}
	return names
}

// block is a block of Go on a page, without its import lines.
type block struct {
	name      string // "README.md:12"
	signature string
	imports   []string
	code      string
}

// blocks returns the blocks of a page. A diff has two.
func blocks(page, text string) []block {
	var all []block
	add := func(at int, kind, signature, code string) {
		signature, hidden, _ := strings.Cut(signature, " import ")
		b := block{name: fmt.Sprintf("%s:%d%s", page, strings.Count(text[:at], "\n")+1, kind), signature: signature, code: code}
		for _, m := range quoted.FindAllStringSubmatch(hidden, -1) {
			b.imports = append(b.imports, m[1])
		}
		if head := imports.FindString(code); head != "" {
			b.code = code[len(head):]
			for _, m := range quoted.FindAllStringSubmatch(head, -1) {
				b.imports = append(b.imports, m[1])
			}
		}
		all = append(all, b)
	}
	for _, m := range goBlock.FindAllStringSubmatchIndex(text, -1) {
		signature := "()"
		if m[2] >= 0 {
			signature = text[m[2]:m[3]]
		}
		add(m[4], "", signature, text[m[4]:m[5]])
	}
	for _, m := range goDiff.FindAllStringSubmatchIndex(text, -1) {
		for kind, gone := range map[string]string{" as it was": "+", " as it is": "-"} {
			var side strings.Builder
			for line := range strings.Lines(text[m[4]:m[5]]) {
				if !strings.HasPrefix(line, gone) {
					side.WriteString(strings.TrimLeft(line[:1], " +-") + line[1:])
				}
			}
			add(m[4], kind, text[m[2]:m[3]], side.String())
		}
	}
	return all
}

func TestGoInPagesCompiles(t *testing.T) {
	var all []block
	paths := slices.Clone(imported)
	for page, text := range read(t).pages {
		for _, b := range blocks(page, text) {
			all = append(all, b)
			paths = append(paths, b.imports...)
			if file, err := parser.ParseFile(token.NewFileSet(), b.name, b.code, parser.ImportsOnly); err == nil { // it begins with "package"
				for _, i := range file.Imports {
					paths = append(paths, strings.Trim(i.Path.Value, `"`))
				}
			}
		}
	}
	slices.Sort(paths)
	loaded, err := packages.Load(&packages.Config{Mode: packages.NeedName | packages.NeedTypes | packages.NeedImports | packages.NeedDeps | packages.NeedExportFile}, slices.Compact(paths)...)
	if err != nil {
		t.Fatal(err)
	}
	known := importer{}
	for _, p := range loaded {
		for _, err := range p.Errors {
			t.Errorf("%s: %v", p.PkgPath, err)
		}
		known[p.PkgPath] = p.Types
	}
	for _, b := range all {
		if err := known.check(b); err != nil {
			t.Errorf("%s: %v", b.name, err)
		}
	}
	t.Logf("%d blocks", len(all))
}

func TestIndexLinksEachPageOfDocs(t *testing.T) {
	all := read(t)
	if !strings.Contains(all.pages["README.md"], "](docs/README.md)") {
		t.Error("README.md does not link docs/README.md")
	}
	for page, text := range all.pages {
		name, ok := strings.CutPrefix(page, "docs/")
		if !ok || name == "README.md" {
			continue
		}
		if !strings.Contains(all.pages["docs/README.md"], "]("+name+")") {
			t.Errorf("docs/README.md does not link %s", name)
		}
		if !regexp.MustCompile(`\A# .+\n\n\w`).MatchString(text) {
			t.Errorf("%s does not begin with a heading and its purpose", page)
		}
	}
}

func TestGoThatDoesNotCompileIsFound(t *testing.T) {
	known := importer{}
	for _, c := range []struct{ signature, block, want string }{
		{"()", "undefined()", "undefined: undefined"},
		{"() int", `return "a"`, "cannot use"},
		{"()", "if {", "missing condition"},
		{"()", "x := 1", ""},
		{"(n int) error", "if n > 0 {\n\treturn nil\n}", ""},
		{"()", "func f() {}", ""},
		{"()", "import \"nowhere.example/a\"\n\nx := a.B", "nowhere.example/a"},
		{"(t *T)", "type T struct{}", ""},
	} {
		page := "<!-- go: " + c.signature + " -->\n```go\n" + c.block + "\n```\n"
		err := known.check(blocks("page", page)[0])
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: got %v, want %q", c.block, err, c.want)
		}
	}
}

func TestBothSidesOfADiffAreGo(t *testing.T) {
	sides := blocks("page", "<!-- go: () -->\n```diff\n-import \"a\"\n+import \"b\"\n \n-x := a.A\n+x := b.B\n _ = x\n```\n")
	slices.SortFunc(sides, func(a, b block) int { return strings.Compare(a.code, b.code) })
	if len(sides) != 2 || sides[0].code != "x := a.A\n_ = x\n" || sides[1].code != "x := b.B\n_ = x\n" || sides[0].imports[0] != "a" || sides[1].imports[0] != "b" {
		t.Errorf("got %+v", sides)
	}
}

// importer finds loaded packages by their path.
type importer map[string]*types.Package

// Import implements types.Importer.
func (known importer) Import(path string) (*types.Package, error) {
	if p := known[path]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("%s is not in the go.mod of tools/docs", path)
}

// check compiles a block of Go.
func (known importer) check(b block) error {
	var head strings.Builder
	names := map[string]bool{}
	for _, path := range slices.Concat(b.imports, imported) {
		p, err := known.Import(path)
		if err != nil && slices.Contains(b.imports, path) {
			return err
		}
		if err == nil && !names[p.Name()] { // a block's own imports come first: net/mail replaces go-mail
			names[p.Name()] = true
			fmt.Fprintf(&head, "import %q; ", path)
		}
	}
	files := token.NewFileSet()
	parse := func(source string) (*ast.File, error) {
		return parser.ParseFile(files, b.name, source, parser.SkipObjectResolution)
	}
	var file *ast.File
	var err error
	if strings.HasPrefix(b.code, "package ") {
		file, err = parse(b.code)
	} else if file, err = parse("package page; " + head.String() + b.code); err != nil {
		// The panic is for blocks that omit their last return.
		file, err = parse("package page; " + head.String() + "func _" + b.signature + " {\n" + b.code + "\npanic(0)\n}")
	}
	if err != nil {
		return err
	}
	var first error
	conf := types.Config{Importer: known, Error: func(err error) {
		if e, ok := err.(types.Error); first == nil && !(ok && e.Soft) { // soft: something is unused
			first = err
		}
	}}
	conf.Check("page", files, []*ast.File{file}, nil)
	return first
}
